"""The shapes that meet a wish: surveyed, solved for, and where a bound on the loss is asked, tried until it is kept.

Knows the order of survey, solution and trial; the mathematics is elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from kvexport.calibrate import Moments
from kvexport.convert.budget import Frontier
from kvexport.convert.groups import Shape
from kvexport.convert.methods import Method
from kvexport.convert.pipeline import convert
from kvexport.convert.survey import LayerSurvey, survey
from kvexport.convert.wish import Wish, fixed_shape, group_sizes
from kvexport.decoder import Decoder
from kvexport.errors import UsageError
from kvexport.progress import Progress

MARGIN = 0.8  # of --max-kl that held-out calibration text may lose, since other text may lose more
_SHOWN = 8  # points of the frontier that are reported: eighths of the trained model's cache
_TRIES = 5  # conversions at most in search of the cheapest that keeps --max-kl
_NEAR = 1.02  # a try within this factor of the cheapest that the predictions allow is good enough


@dataclass(frozen=True)
class Point:
    """One point of the frontier.

    Attributes:
        kv_width: numbers cached per token, all layers.
        predicted_kl: mean KL to the original, nats per token, as the survey predicts it.
        measured_kl: on held-out calibration text, after conversion; None where that was not tried.
    """

    kv_width: int
    predicted_kl: float
    measured_kl: float | None = None


@dataclass(frozen=True)
class Choice:
    """What each layer is to cache, and what the choice was made from; no points and layers where none was left."""

    shapes: list[Shape]
    points: tuple[Point, ...] = ()
    layers: tuple[LayerSurvey, ...] = ()


def choose(
    decoder: Decoder,
    windows: Tensor,
    wish: Wish,
    method: Method,
    moments_of: Callable[[int], Moments] | None,
    capacity: int | None,
    progress: Progress,
) -> Choice:
    """The shapes with the least predicted KL that the wish allows, or the cheapest that keep its bound.

    Raises:
        UsageError: the wish contradicts itself or cannot be met.
    """
    count, attention = len(decoder.layers), decoder.layers[0].attention
    shape = fixed_shape(wish, method, attention)
    if shape is not None:
        return Choice([shape] * count)
    sizes = group_sizes(wish, attention)
    del attention  # its layer need not stay in memory
    found = survey(decoder, windows, sizes, wish.ratio, moments_of, capacity)
    with progress.stage("Surveying layers", count):
        for _ in found:
            progress.advance()
    frontier = Frontier(found.layers, wish.widths)
    tried: list[Point] = []
    if wish.max_kl is None:
        kv_width = _within(frontier, wish.ratio)
    else:

        def measured(shapes: Sequence[Shape]) -> float:
            conversion = convert(decoder, windows, shapes, method, moments_of, capacity)
            with progress.stage("Trying a conversion", count):
                for _ in conversion:
                    progress.advance()
            return conversion.divergence().mean_kl

        kv_width, tried = _keeping(frontier, wish.max_kl * MARGIN, measured)
    shapes = frontier.shapes(kv_width)
    shown = [frontier.most * eighths // _SHOWN for eighths in range(1, _SHOWN + 1)]
    shown.append(sum(each.kv_width for each in shapes))
    points = [Point(width, frontier.kl(width)) for width in shown if width >= frontier.fewest]
    known = {point.kv_width: point for point in (*points, *tried)}
    return Choice(shapes, tuple(known[width] for width in sorted(known)), tuple(found.layers))


def _within(frontier: Frontier, ratio: float) -> int:
    wanted = int(ratio * frontier.most)
    if wanted < frontier.fewest:
        raise UsageError(
            "no choice of widths caches so little", seen=f"--kv-ratio {ratio:g}",
            allowed=f"{frontier.fewest / frontier.most:.4g} to 1", fix="ask for more, or other widths",
        )  # fmt: skip
    return wanted


def _keeping(frontier: Frontier, bound: float, measured: Callable[[Sequence[Shape]], float]) -> tuple[int, list[Point]]:
    """The fewest cached numbers tried whose measured KL keeps the bound, and all that was tried.

    Predictions are corrected by what the last try measured. The trained model itself always keeps the bound.
    """
    best, worst, scale = frontier.most, 0, 1.0
    tried: list[Point] = []
    for _ in range(_TRIES):
        kv_width = frontier.cheapest(bound / scale)
        if kv_width <= worst:
            kv_width = (worst + best) // 2
        if kv_width >= best / _NEAR:
            break
        shapes = frontier.shapes(kv_width)
        kv_width = sum(shape.kv_width for shape in shapes)  # what is left over buys nothing
        predicted, found = frontier.kl(kv_width), measured(shapes)
        tried.append(Point(kv_width, predicted, found))
        scale = found / predicted if predicted > 0 else 1.0
        if found <= bound:
            best = kv_width
        else:
            worst = kv_width
    return best, tried
