"""The ways that meet a request: surveyed, solved for, and where a bound on the loss is asked, tried until it is kept.

Knows the order of survey, solution and trial; the mathematics is elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from kvexport.calibrate import Moments
from kvexport.convert.budget import Frontier, shapes_for
from kvexport.convert.groups import trained_shape
from kvexport.convert.methods import LayerPlan, Method
from kvexport.convert.pipeline import convert
from kvexport.convert.request import CompressionRequest, fixed_shape, group_sizes, require_ratio
from kvexport.convert.sensitivity import LayerSensitivity, analyze_sensitivity
from kvexport.model.decoder import Decoder
from kvexport.progress import Progress

# Of --max-kl that held-out calibration text may lose: text of another kind lost up to 1.6 times what the model's own did, on a
# trained model of 5.9 M parameters.
MARGIN = 0.5
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
class CompressionPlan:
    """How each layer is to be converted, and what the choice was made from; no points and layers where none was left."""

    layer_plans: list[LayerPlan]
    points: tuple[Point, ...] = ()
    layers: tuple[LayerSensitivity, ...] = ()


def plan_compression(
    decoder: Decoder,
    windows: Tensor,
    request: CompressionRequest,
    methods: Sequence[Method],
    moments_of: Callable[[int], Moments] | None,
    capacity: int | None,
    progress: Progress,
) -> CompressionPlan:
    """The ways with the least predicted KL that the request allows, or the cheapest that keep its bound.

    Raises:
        UsageError: the request contradicts itself or cannot be met.
    """
    count, attention = len(decoder.layers), decoder.layers[0].attention
    require_ratio(request, methods, attention)
    trained, shape = trained_shape(attention), fixed_shape(request, methods, attention)
    if shape is not None and (len(methods) == 1 or shape == trained):
        return CompressionPlan([LayerPlan(methods[0], shape)] * count)
    sizes, ratio = group_sizes(request, attention), request.ratio
    if shape is not None:
        sizes, ratio = [trained.kv_heads // shape.kv_heads], shape.kv_width / trained.kv_width
    del attention  # its layer need not stay in memory
    found = analyze_sensitivity(decoder, windows, methods, sizes, ratio, moments_of, capacity)
    with progress.stage("Surveying layers", count):
        for _ in found:
            progress.advance()
    allowed = [
        shapes_for(layer.trained, layer.sizes, request.widths) if shape is None else [shape]
        for layer in found.layers
    ]
    frontier, tried = Frontier(found.layers, allowed), list[Point]()
    if shape is not None:
        return CompressionPlan(frontier.layer_plans(frontier.most), layers=tuple(found.layers))
    if request.max_kl is None:
        kv_width = max(
            int(request.ratio * frontier.most), frontier.fewest
        )  # fewer only by rounding: `require_ratio`
    else:

        def measured(layer_plans: Sequence[LayerPlan]) -> float:
            conversion = convert(decoder, windows, layer_plans, moments_of, capacity)
            with progress.stage("Trying a conversion", count):
                for _ in conversion:
                    progress.advance()
            return conversion.divergence().mean_kl

        kv_width, tried = _keeping(frontier, request.max_kl * MARGIN, measured)
    layer_plans = frontier.layer_plans(kv_width)
    shown = [frontier.most * eighths // _SHOWN for eighths in range(1, _SHOWN + 1)]
    shown.append(sum(layer_plan.shape.kv_width for layer_plan in layer_plans))
    points = [Point(width, frontier.kl(width)) for width in shown if width >= frontier.fewest]
    known = {point.kv_width: point for point in (*points, *tried)}
    return CompressionPlan(layer_plans, tuple(known[width] for width in sorted(known)), tuple(found.layers))


def _keeping(
    frontier: Frontier, bound: float, measured: Callable[[Sequence[LayerPlan]], float]
) -> tuple[int, list[Point]]:
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
        layer_plans = frontier.layer_plans(kv_width)
        kv_width = sum(
            layer_plan.shape.kv_width for layer_plan in layer_plans
        )  # what is left over buys nothing
        predicted, found = frontier.kl(kv_width), measured(layer_plans)
        tried.append(Point(kv_width, predicted, found))
        scale = found / predicted if predicted > 0 else 1.0
        if found <= bound:
            best = kv_width
        else:
            worst = kv_width
    return best, tried
