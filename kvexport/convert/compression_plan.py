"""Plan of a whole conversion: sensitivity analysis, exact choice per layer, and trials where --max-kl bounds
the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from kvexport.calibrate import Moments
from kvexport.convert.budget import Frontier, shapes_for
from kvexport.convert.groups import trained_shape
from kvexport.convert.layer_sensitivity import LayerSensitivity
from kvexport.convert.methods import LayerPlan, Method
from kvexport.convert.pipeline import convert
from kvexport.convert.request import CompressionRequest, fixed_shape, group_sizes, require_ratio
from kvexport.convert.sensitivity import analyze_sensitivity
from kvexport.model.decoder import Attention, Decoder
from kvexport.progress import Progress

# Share of --max-kl that held-out calibration text may lose. Text of another kind lost up to 1.6 times as much
# as the model's own text, measured on a trained model of 5.9 M parameters.
MARGIN = 0.5
_SHOWN = 8  # points of the frontier that are reported: eighths of the trained model's cache
_TRIES = 5  # conversions at most in search of the smallest cache that keeps --max-kl
_NEAR = 1.02  # the search ends within this factor of the smallest cache that the predictions allow


@dataclass(frozen=True)
class Point:
    """One point of the frontier.

    Attributes:
        kv_width: cached numbers per token, all layers.
        predicted_kl: mean KL to the original, nats per token, predicted by the sensitivity analysis.
        measured_kl: mean KL on held-out calibration text after conversion, nats per token; None: not tried.
    """

    kv_width: int
    predicted_kl: float
    measured_kl: float | None = None


@dataclass(frozen=True)
class CompressionPlan:
    """How each layer is converted, and the data behind the choice.

    Attributes:
        layer_plans: one plan per layer.
        points: points of the frontier, ascending in `kv_width`; empty if the request left no choice of shape.
        layers: sensitivity of each layer; empty if none was analysed.
    """

    layer_plans: list[LayerPlan]
    points: tuple[Point, ...] = ()
    layers: tuple[LayerSensitivity, ...] = ()


def sizes_to_analyze(
    request: CompressionRequest, methods: Sequence[Method], attention: Attention
) -> list[int]:
    """Group sizes whose sensitivity the plan depends on, ascending; none if the request leaves no choice.

    Raises:
        UsageError: the request contradicts itself or cannot be met.
    """
    require_ratio(request, methods, attention)
    trained, shape = trained_shape(attention), fixed_shape(request, methods, attention)
    if shape is None:
        return group_sizes(request, attention)
    return [] if len(methods) == 1 or shape == trained else [trained.kv_heads // shape.kv_heads]


def plan_compression(
    decoder: Decoder,
    windows: Tensor,
    request: CompressionRequest,
    methods: Sequence[Method],
    moments_of: Callable[[int], Moments] | None,
    capacity: int | None,
    progress: Progress,
    layers: Sequence[LayerSensitivity] | None = None,
) -> CompressionPlan:
    """Choose the plan with the least predicted KL that the request allows, or the smallest that keeps its
    bound.

    Args:
        decoder: the trained model.
        windows: calibration tokens [N, length] int64.
        request: what the user requests.
        methods: methods that each layer can choose from.
        moments_of: returns the saved moments of a layer; None: moments are measured on `windows`.
        capacity: tokens of a sequence for which codes of rotated keys are made [default: length].
        progress: shows the stages.
        layers: each layer's sensitivity for `sizes_to_analyze` [default: it is analysed here, if the request
            leaves a choice].

    Raises:
        UsageError: the request contradicts itself or cannot be met.
    """
    count, attention = len(decoder.layers), decoder.layers[0].attention
    sizes = sizes_to_analyze(request, methods, attention)
    shape = fixed_shape(request, methods, attention)
    if not sizes:
        assert shape is not None
        return CompressionPlan([LayerPlan(methods[0], shape)] * count)
    del attention  # its layer need not stay in memory
    if layers is None:
        layers = analyze_sensitivity(
            decoder, windows, methods, sizes, moments_of=moments_of, capacity=capacity, progress=progress
        )
    allowed = [
        shapes_for(layer.trained, sizes, request.widths) if shape is None else [shape] for layer in layers
    ]
    frontier, tried = Frontier(layers, allowed), list[Point]()
    if shape is not None:
        return CompressionPlan(frontier.layer_plans(frontier.most), layers=tuple(layers))
    if request.max_kl is None:
        # below `fewest` only by rounding: `require_ratio` has checked it
        kv_width = max(int(request.ratio * frontier.most), frontier.fewest)
    else:

        def measure(layer_plans: Sequence[LayerPlan]) -> float:
            conversion = convert(decoder, windows, layer_plans, moments_of, capacity)
            with progress.stage("Trying a conversion", count):
                for _ in conversion:
                    progress.advance()
            return conversion.divergence().mean_kl

        kv_width, tried = search_within_bound(frontier, request.max_kl * MARGIN, measure)
    layer_plans = frontier.layer_plans(kv_width)
    shown = [frontier.most * eighths // _SHOWN for eighths in range(1, _SHOWN + 1)]
    shown.append(sum(plan.shape.kv_width for plan in layer_plans))
    points = [Point(width, frontier.kl(width)) for width in shown if width >= frontier.fewest]
    by_width = {point.kv_width: point for point in (*points, *tried)}
    return CompressionPlan(layer_plans, tuple(by_width[width] for width in sorted(by_width)), tuple(layers))


def search_within_bound(
    frontier: Frontier, bound: float, measure: Callable[[Sequence[LayerPlan]], float]
) -> tuple[int, list[Point]]:
    """Search the smallest cache whose measured KL keeps the bound, in a few conversions.

    Each try corrects the predictions by what the last try measured. The trained model itself always keeps the
    bound.

    Args:
        frontier: predictions.
        bound: largest mean KL, nats per token.
        measure: converts by the given plans and returns the mean KL on held-out windows, nats per token.

    Returns:
        Cached numbers per token of the smallest cache that kept the bound, and all points tried.
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
        kv_width = sum(plan.shape.kv_width for plan in layer_plans)  # the plans may need less than allowed
        predicted, measured = frontier.kl(kv_width), measure(layer_plans)
        tried.append(Point(kv_width, predicted, measured))
        scale = measured / predicted if predicted > 0 else 1.0
        if measured <= bound:
            best = kv_width
        else:
            worst = kv_width
    return best, tried
