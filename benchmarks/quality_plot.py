"""Draw the charts of a quality record as SVG files: the loss at each ratio, and the loss far into the
context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from kvexport.analyze.charts import Axis

_COLOURS = ("#0068b3", "#c24e00", "#00805d", "#8a3ffc", "#5a6675")
_STYLE = (
    "text{font:12px "
    "system-ui,sans-serif;fill:#1c2430}.soft{fill:#5a6675}.end{text-anchor:end}.mid{text-anchor:middle}"
    ".grid{stroke:#dde2e8}.title{font-weight:600}.dot{fill:#fff;font-size:10px;font-weight:600;text-anchor:middle}"
)
_ROW, _TOP, _NAMES, _PLOT, _GAP = 21, 58, 150, 360, 44  # pixels
_LEAST = 1e-9  # KL below it is rounding


def overview(record: dict[str, Any]) -> str | None:
    """KL of every method at every ratio, a panel for each text; None before there is any row."""
    rows = [each for each in record["rows"].values() if each.get("section") == "methods"]
    if not rows:
        return None
    names = list(dict.fromkeys(each["name"] for each in rows))
    ratios = list(dict.fromkeys(each["ratio"] for each in rows))
    texts = list(record["settings"]["texts"])
    axis = _log_axis(
        "KL to the original, nats per token", [_kl(each, text) for each in rows for text in texts]
    )
    bottom = _TOP + _ROW * len(names)
    parts = [_key(["KV numbers:", *ratios], 16)]
    for at, name in enumerate(names):
        parts.append(
            f'<text class="end" x="{_NAMES - 10}" '
            f'y="{_TOP + _ROW * (at + 0.5) + 4:.1f}">{escape(name)}</text>'
        )
    for panel, text in enumerate(texts):
        left = _NAMES + panel * (_PLOT + _GAP)
        parts.append(f'<text class="title" x="{left}" y="{_TOP - 12}">{escape(text)}</text>')
        parts.append(_vertical_grid(axis, left, bottom))
        for each in rows:
            x = left + axis.place(_kl(each, text)) * _PLOT
            y = _TOP + _ROW * (names.index(each["name"]) + 0.5)
            parts.append(_dot(x, y, each["ratio"], ratios.index(each["ratio"])))
    width = _NAMES + len(texts) * (_PLOT + _GAP)
    return _svg("KL of every method at equal KV numbers", width, bottom + 44, parts)


def offsets_chart(record: dict[str, Any]) -> str | None:
    """KL by the position of a window, a panel for each text; None before there is any line."""
    lines = {key.removeprefix("long-"): each for key, each in record["rows"].items() if "kl" in each}
    lines.pop("trained", None)
    if not lines:
        return None
    texts, height, left_of_all = list(record["settings"]["texts"]), 240, 56
    places = next(iter(lines.values()))["offsets"]
    x = Axis("position of a window's first token", 0, max(places[-1], 1))
    y = _log_axis(
        "KL, nats per token", [kl for each in lines.values() for kls in each["kl"].values() for kl in kls]
    )
    bottom, parts = _TOP + height, [_key(["", *lines], 16, lines=True)]
    for panel, text in enumerate(texts):
        left = left_of_all + panel * (_PLOT + _GAP + left_of_all)
        parts.append(f'<text class="title" x="{left}" y="{_TOP - 12}">{escape(text)}</text>')
        for tick in y.ticks():
            at = bottom - y.place(tick) * height
            parts.append(f'<path class="grid" d="M{left} {at:.1f}h{_PLOT}"/>')
            parts.append(f'<text class="soft end" x="{left - 6}" y="{at + 4:.1f}">{y.text(tick)}</text>')
        for tick in x.ticks():
            at = left + x.place(tick) * _PLOT
            parts.append(f'<text class="soft mid" x="{at:.1f}" y="{bottom + 18}">{x.text(tick)}</text>')
        parts.append(f'<text class="soft mid" x="{left + _PLOT / 2}" y="{bottom + 36}">{x.label}</text>')
        parts.append(f'<text class="soft end" x="{left + _PLOT}" y="{_TOP - 12}">{y.label}</text>')
        for slot, each in enumerate(lines.values()):
            points = [
                (left + x.place(place) * _PLOT, bottom - y.place(max(kl, _LEAST)) * height)
                for place, kl in zip(places, each["kl"][text], strict=True)
            ]
            path = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
            parts.append(f'<path fill="none" stroke="{_COLOURS[slot]}" stroke-width="2" d="M{path}"/>')
            parts += [_mark(a, b, slot) for a, b in points]
    width = left_of_all + len(texts) * (_PLOT + _GAP + left_of_all)
    return _svg("KL of windows far into the context", width, bottom + 48, parts)


def _kl(figures: dict[str, Any], text: str) -> float:
    return max(figures["texts"][text]["mean_kl"], _LEAST)


def _log_axis(label: str, values: Sequence[float]) -> Axis:
    """Whole decades around all values."""
    low = math.floor(math.log10(max(min(values), _LEAST)))
    high = math.ceil(math.log10(max(*values, _LEAST * 10)))
    return Axis(label, 10.0**low, 10.0 ** max(high, low + 1), log=True)


def _vertical_grid(axis: Axis, left: float, bottom: float) -> str:
    parts = []
    for tick in axis.ticks():
        x = left + axis.place(tick) * _PLOT
        parts.append(f'<path class="grid" d="M{x:.1f} {_TOP}V{bottom}"/>')
        parts.append(f'<text class="soft mid" x="{x:.1f}" y="{bottom + 18}">{axis.text(tick)}</text>')
    parts.append(
        f'<text class="soft mid" x="{left + _PLOT / 2}" y="{bottom + 36}">{escape(axis.label)}</text>'
    )
    return "".join(parts)


def _key(names: Sequence[str], y: float, lines: bool = False) -> str:
    """What the marks mean, after the first of `names`, which is a heading."""
    x, parts = 16.0, [f'<text class="soft" x="16" y="{y + 4}">{escape(names[0])}</text>']
    x += 8 * len(names[0]) + 8
    for slot, name in enumerate(names[1:]):
        parts.append(_mark(x, y, slot) if lines else _dot(x, y, name, slot))
        parts.append(f'<text x="{x + 12}" y="{y + 4}">{escape(name)}</text>')
        x += 8 * len(name) + 40
    return "".join(parts)


def _dot(x: float, y: float, ratio: str, slot: int) -> str:
    """A disc with the ratio's denominator in it."""
    inside = f'<text class="dot" x="{x:.1f}" y="{y + 3.5:.1f}">{escape(ratio.partition("/")[2])}</text>'
    colour = _COLOURS[slot % len(_COLOURS)]
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7.5" fill="{colour}" fill-opacity="0.9"/>{inside}'


def _mark(x: float, y: float, slot: int) -> str:
    """A disc, a square, a triangle, a diamond: told apart without colour."""
    shapes = ("m0-4a4 4 0 1 0 .01 0z", "m-4-4h8v8h-8z", "m0-5l5 9h-10z", "m0-5l5 5l-5 5l-5-5z")
    return f'<path fill="{_COLOURS[slot]}" d="M{x:.1f} {y:.1f}{shapes[slot % len(shapes)]}"/>'


def _svg(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img">'
    )
    page = (
        f'<title>{escape(title)}</title><style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
    )
    return "\n".join([head, page, *parts, "</svg>"]) + "\n"
