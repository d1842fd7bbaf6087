"""Draw the chart of an eviction record: the loss over the share of the cache that is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from typing import Any

from eviction_tasks import TASKS
from quality_plot import _COLOURS, _TOP, _log_axis, _mark, _svg

from kvexport.analyze.charts import Axis
from kvexport.eviction.config import POLICIES

_LEAST = 1e-4  # nats; less is drawn there
_WIDE, _HIGH, _SIDE, _BELOW = 300, 200, 62, 78  # pixels
# Line styles. A window keeps recent tokens by itself.
_STYLES = {"bare": "2 4", "recent-first": "7 3", "half-first": "", "first": "", "half-first-skip": "10 3 2 3"}
_LEGEND = {
    "bare": "nothing protected",
    "recent-first": "recent and first protected",
    "half-first": "half of the budget and first protected",
    "half-first-skip": "the same, first layers whole",
}

Figures = dict[str, Any]
Value = Callable[[Figures], float]


def chart(record: dict[str, Any]) -> str | None:
    """A panel for each text and each task; None before there is anything to draw."""
    found = [
        each for each in record["rows"].values() if each["heads"] == "1" and each["protection"] in _STYLES
    ]
    language = [each for each in found if each["kind"] == "lm"]
    texts = list(record["settings"]["texts"]) if language else []
    panels: list[list[tuple[str, Axis, list[Figures], Value]]] = [[], [], []]
    if language:
        y = _log_axis("nats", [_rise(text, each) for each in language for text in texts])
        for text in texts:
            panels[0].append((f"{text}: nats lost (0.0001: or less)", y, language, partial(_rise, text)))
    for row, protocol in enumerate(("once", "chunked"), 1):
        for task in TASKS:
            mine = [each for each in found if each.get("task") == task and each["protocol"] == protocol]
            if mine:
                y = Axis("accuracy", 0.0, 1.0, percent=True)
                panels[row].append((f"{task}, {protocol}: found", y, mine, lambda each: each["accuracy"]))
    panels = [row for row in panels if row]
    if not panels:
        return None
    parts = _key()
    for down, shown in enumerate(panels):
        for right, panel in enumerate(shown):
            parts += _panel(*panel, _SIDE + right * (_WIDE + _SIDE), _TOP + 28 + down * (_HIGH + _BELOW))
    width = _SIDE + max(map(len, panels)) * (_WIDE + _SIDE)
    return _svg("What eviction costs", max(width, 1000), _TOP + 28 + len(panels) * (_HIGH + _BELOW), parts)


def _rise(text: str, figures: Figures) -> float:
    return max(float(figures["texts"][text]["increase"]), _LEAST)


def _panel(title: str, y: Axis, rows: Sequence[Figures], value: Value, left: float, top: float) -> list[str]:
    x = Axis("of the KV numbers held", 0.0, 1.0, percent=True)
    bottom = top + _HIGH
    parts = [f'<text class="title" x="{left}" y="{top - 10}">{escape(title)}</text>']
    for tick in y.ticks():
        at = bottom - y.place(tick) * _HIGH
        parts.append(f'<path class="grid" d="M{left} {at:.1f}h{_WIDE}"/>')
        parts.append(f'<text class="soft end" x="{left - 6}" y="{at + 4:.1f}">{y.text(tick)}</text>')
    for tick in x.ticks():
        parts.append(
            f'<text class="soft mid" x="{left + x.place(tick) * _WIDE:.1f}" '
            f'y="{bottom + 16}">{x.text(tick)}</text>'
        )
    parts.append(f'<text class="soft mid" x="{left + _WIDE / 2}" y="{bottom + 32}">{x.label}</text>')
    for slot, policy in enumerate(POLICIES):
        for protection, dashes in _STYLES.items():
            line = sorted(
                (each["held"], value(each))
                for each in rows
                if each["policy"] == policy and each["protection"] == protection
            )
            points = [(left + x.place(a) * _WIDE, bottom - y.place(b) * _HIGH) for a, b in line]
            if points:
                path = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
                parts.append(
                    f'<path fill="none" stroke="{_COLOURS[slot]}" stroke-width="2" '
                    f'stroke-dasharray="{dashes}" d="M{path}"/>'
                )
                parts += [_mark(a, b, slot) for a, b in points]
    return parts


def _key() -> list[str]:
    """What colours, marks and dashes mean."""
    parts, x = [], 24.0
    for slot, policy in enumerate(POLICIES):
        parts += [_mark(x, 16, slot), f'<text x="{x + 12}" y="20">{escape(policy)}</text>']
        x += 8 * len(policy) + 48
    x = 24.0
    for protection, told in _LEGEND.items():
        dashes = _STYLES[protection]
        parts.append(
            f'<path fill="none" stroke="#1c2430" stroke-width="2" stroke-dasharray="{dashes}" d="M{x - 8} '
            '38h34"/>'
        )
        parts.append(f'<text x="{x + 32}" y="42">{escape(told)}</text>')
        x += 6 * len(told) + 72
    return parts
