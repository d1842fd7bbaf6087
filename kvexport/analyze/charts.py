"""Line charts as inline SVG; colours are set by the classes of page.css."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 20, 10, 42
_MARKS = (
    '<circle cx="{x}" cy="{y}" r="3.5"/>',
    '<path d="M{x} {y}m-3.4-3.4h6.8v6.8h-6.8z"/>',
    '<path d="M{x} {y}m0-4.4l4.4 7.8h-8.8z"/>',
)


@dataclass(frozen=True)
class Line:
    """A line through points from left to right.

    Attributes:
        points: (x, y) in the units of the axes.
        slot: index of colour and marker.
        marks: whether points have markers.
        layer: layer that the line belongs to, for page.js; None: none.
    """

    points: Sequence[tuple[float, float]]
    slot: int
    marks: bool = True
    layer: int | None = None


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high` in the unit of the data."""

    label: str
    low: float
    high: float
    log: bool = False
    percent: bool = False
    whole: bool = False

    def place(self, value: float) -> float:
        """Position of a value: 0 at `low`, 1 at `high`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Values of the ticks, ascending."""
        if self.log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            return [10.0**power for power in range(first, last + 1, max(1, math.ceil((last - first) / 6)))]
        step = _step(self.high - self.low, self.whole)
        count = math.floor(self.high / step + 1e-9) - math.ceil(self.low / step - 1e-9)
        return [round((math.ceil(self.low / step - 1e-9) + i) * step, 10) for i in range(count + 1)]

    def text(self, tick: float) -> str:
        """Label of a tick, as SVG text."""
        if self.log:
            power = f"{round(math.log10(tick))}".replace("-", "−")
            return "1" if power == "0" else f'10<tspan dy="-5" font-size="9">{power}</tspan>'
        return f"{tick:.0%}" if self.percent else f"{tick:g}"


def layer_axis(layers: int) -> Axis:
    """Axis of layers 0 to `layers` - 1, with a margin."""
    return Axis("layer", -0.3, max(layers - 1, 0) + 0.3, whole=True)


def from_zero(label: str, values: Sequence[float], *, percent: bool = False) -> Axis:
    """Axis from 0 to the first tick at or above all values."""
    high = max(values, default=0.0) or 1.0
    step = _step(high, whole=False)
    return Axis(label, 0.0, math.ceil(high / step - 1e-9) * step, percent=percent)


def line_chart(
    title: str, x: Axis, y: Axis, lines: Sequence[Line], *, width: int = 480, reference: float | None = None
) -> str:
    """One chart as SVG.

    Args:
        title: text for screen readers.
        x: horizontal axis.
        y: vertical axis.
        lines: the lines.
        width: in pixels.
        reference: y of a dashed horizontal line; None: none.
    """
    height = 270
    right, bottom = width - _RIGHT, height - _BOTTOM

    def px(value: float) -> float:
        return round(_LEFT + x.place(value) * (right - _LEFT), 1)

    def py(value: float) -> float:
        return round(bottom - y.place(value) * (bottom - _TOP), 1)

    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">',
        '<g class="grid">',
    ]
    parts += [f'<path d="M{_LEFT} {py(tick)}H{right}"/>' for tick in y.ticks()]
    parts.append(f'</g><path class="axis" d="M{_LEFT} {bottom}H{right}"/><g class="ticks">')
    parts += [
        f'<text x="{_LEFT - 7}" y="{py(tick) + 4}" text-anchor="end">{y.text(tick)}</text>'
        for tick in y.ticks()
    ]
    parts += [
        f'<text x="{px(tick)}" y="{bottom + 17}" text-anchor="middle">{x.text(tick)}</text>'
        for tick in x.ticks()
    ]
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text x="{(_LEFT + right) / 2}" y="{height - 6}" text-anchor="middle">{escape(x.label)}</text>'
    )
    parts.append(
        f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(y.label)}</text></g>"
    )
    if reference is not None:
        parts.append(f'<path class="reference" d="M{_LEFT} {py(reference)}H{right}"/>')
    for line in lines:
        places = [(px(a), py(b)) for a, b in line.points]
        of_layer = "" if line.layer is None else f' data-layer="{line.layer}"'
        parts.append(
            f'<g class="line s{line.slot}"{of_layer}><path d="M{"L".join(f"{a} {b}" for a, b in places)}"/>'
        )
        if line.marks:
            parts.append(
                '<g class="marks">' + "".join(_MARKS[line.slot].format(x=a, y=b) for a, b in places) + "</g>"
            )
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def legend(names: Sequence[str]) -> str:
    """Legend of names with the markers of slots 0, 1, ..."""
    entries = "".join(
        f'<li class="s{slot}"><svg viewBox="0 0 22 12" aria-hidden="true"><path class="stroke" d="M0 6H22"/>'
        f'<g class="marks">{_MARKS[slot].format(x=11, y=6)}</g></svg>{escape(name)}</li>'
        for slot, name in enumerate(names)
    )
    return f'<ul class="legend">{entries}</ul>'


def _step(span: float, whole: bool) -> float:
    """1, 2 or 5 times a power of ten that gives about five ticks in `span`."""
    rough = span / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    return max(1.0, step) if whole else step
