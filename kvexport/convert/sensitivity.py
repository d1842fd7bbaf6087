"""What conversion could cost, layer by layer, before any layer is converted: losses at every width, and what they do.

Each layer's keys, by each method, and apart from them its values are coded once on trial, and the stream that this
disturbs runs on to the logits beside the trained one: so much KL for so much error of the attention output is the layer's
sensitivity. One layer is in memory at a time, and one stream of a few windows for each trial.
Knows how trials run; chooses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvexport.calibrate import Moments
from kvexport.calibrate import windows as attention_windows
from kvexport.convert.apply import LayerCode, apply_code
from kvexport.convert.code_moments import CodeMoments, make_code_moments
from kvexport.convert.codes import Code
from kvexport.convert.groups import WIDEST, Grouping, KVShape, trained_shape
from kvexport.convert.losses import LayerLosses
from kvexport.convert.matching import Group, match_heads, order_of
from kvexport.convert.methods import LayerPlan, Method, layer_code
from kvexport.convert.permute import permute_heads
from kvexport.convert.streams import TrainedStream
from kvexport.model import reference
from kvexport.model.decoder import Attention, Decoder, Layer
from kvexport.model.divergence import DivergenceMeter

_WINDOWS = 8  # that trials run over
_TINY = 1e-12  # of the output's power: no trial loses less


@dataclass(frozen=True)
class Curves:
    """Losses of one layer by one method in groups of one size, summed over groups, at widths 0 to n = size·head_dim: [n + 1].

    Powers of the error of the attention output, E|Δo|².
    """

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class LayerSensitivity:
    """What one layer could lose.

    Attributes:
        trained: what it caches now.
        sizes: of groups, ascending.
        curves: by method and group size.
        output_power: E|o - ō|², what the losses are to be compared with.
        key_sensitivity: by method, mean KL in nats per token for a unit of loss through keys.
        value_sensitivity: through values.
    """

    trained: KVShape
    sizes: tuple[int, ...]
    curves: dict[tuple[Method, int], Curves]
    output_power: float
    key_sensitivity: dict[Method, float]
    value_sensitivity: float

    @property
    def methods(self) -> tuple[Method, ...]:
        return tuple(self.key_sensitivity)

    def kl(self, layer_plan: LayerPlan) -> float:
        """Predicted mean KL, nats per token, of this layer alone converted that way."""
        shape = layer_plan.shape
        if shape == self.trained:
            return 0.0
        curves = self.curves[layer_plan.method, self.trained.kv_heads // shape.kv_heads]
        lost_to_keys = self.key_sensitivity[layer_plan.method] * curves.keys[shape.key_dim]
        return float(lost_to_keys + self.value_sensitivity * curves.values[shape.value_dim])


@dataclass(frozen=True)
class _Trial:
    """A method's trial of a layer: its keys coded, its values coded, and what that is predicted to lose."""

    keys: Layer
    values: Layer
    key_loss: float
    value_loss: float


class SensitivityAnalysis:
    """An iterator over the decoder's layers: `analyze_sensitivity` describes it. `layers` is complete when it has ended."""

    @torch.no_grad()
    def __init__(
        self,
        decoder: Decoder,
        windows: Tensor,
        methods: Sequence[Method],
        sizes: Sequence[int],
        ratio: float,
        moments_of: Callable[[int], Moments] | None,
        capacity: int | None,
    ) -> None:
        self._decoder, self._methods, self._sizes, self._ratio = decoder, methods, tuple(sizes), ratio
        self._moments_of, self._positions = moments_of, windows.shape[1] if capacity is None else capacity
        self._stream = TrainedStream(decoder, windows)
        train = self._stream.train
        self._tried = windows[torch.linspace(0, len(train) - 1, min(_WINDOWS, len(train))).round().long()]
        self._forks = [
            reference.embed(decoder.embedding, self._tried)
        ]  # the trained stream, then each layer's trials'
        self._found: list[
            tuple[LayerSensitivity, list[float]]
        ] = []  # without sensitivities, and what the trials are to lose
        self.layers: list[LayerSensitivity] = []

    def __iter__(self) -> Iterator[None]:
        for index in range(len(self._decoder.layers)):
            self._measure(index)
            yield
        self._finish()

    @torch.no_grad()
    def _measure(self, index: int) -> None:
        layer = self._decoder.layers[index]
        if self._moments_of is None:
            moments = self._stream.measure(layer)
        else:
            self._stream.attend(layer)
            moments = self._moments_of(index)
        curves, trials = dict[tuple[Method, int], Curves](), list[_Trial]()
        size_tried = self._size_tried(layer.attention)
        for method in self._methods:
            code_moments = make_code_moments(
                method.before_rotation, moments, self._decoder.rope, self._positions, layer.attention.window
            )
            losses = LayerLosses(code_moments, layer.attention)
            for size in self._sizes:
                groups = self._groups(method, losses, layer.attention, size)
                of_keys = losses.folded_keys if method.key is None else losses.keys
                found = Curves(sum_of(map(of_keys, groups)), sum_of(map(losses.values, groups)))
                curves[method, size] = found
                if size == size_tried:
                    trials.append(self._trial(layer, code_moments, method, groups, found))
        least = _TINY * float(moments.output_power)
        lost = [max(loss, least) for loss in (trials[0].value_loss, *(each.key_loss for each in trials))]
        shape, power = trained_shape(layer.attention), float(moments.output_power)
        self._found.append((LayerSensitivity(shape, self._sizes, curves, power, {}, 0.0), lost))
        disturbed = [
            self._past(each, self._forks[0]) for each in (trials[0].values, *(each.keys for each in trials))
        ]
        self._forks = [self._past(layer, fork) for fork in self._forks] + disturbed
        self._stream.advance(layer)

    def _rank(self, size: int, attention: Attention) -> int:
        """The even width that keeps the share of the KV bytes that trials keep."""
        return max(2, 2 * round(self._ratio * size * attention.head_dim / 2))

    def _size_tried(self, attention: Attention) -> int:
        """The largest group whose width in a trial an engine could take."""
        return max(
            (size for size in self._sizes if self._rank(size, attention) <= WIDEST), default=self._sizes[0]
        )

    def _groups(self, method: Method, losses: LayerLosses, attention: Attention, size: int) -> list[Group]:
        def loss(group: Group) -> float:
            width = self._rank(size, attention) * len(group) // size  # of part of a group, its share
            return float(losses.estimate(method.before_rotation, group)[width] + losses.values(group)[width])

        return match_heads(attention.num_kv_heads, size, loss)

    def _trial(
        self, layer: Layer, code_moments: CodeMoments, method: Method, groups: Sequence[Group], curves: Curves
    ) -> _Trial:
        order = order_of(groups)
        attention, code_moments = permute_heads(layer.attention, order), code_moments.permute_heads(order)
        grouping = Grouping.of(attention, len(groups))
        n = grouping.size * grouping.head_dim
        rank = min(self._rank(grouping.size, attention), WIDEST)
        code = layer_code(method, code_moments, attention, grouping, KVShape(grouping.kv_heads, rank, rank))
        exact = (
            Code(torch.eye(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)),
        ) * grouping.kv_heads

        def coded(code: LayerCode) -> Layer:
            return replace(
                layer, attention=apply_code(attention, grouping, code, code_moments.moments.value_mean)
            )

        return _Trial(
            keys=coded(replace(code, values=exact)),
            values=coded(replace(code, keys=exact, folds=False, frequencies=None)),
            key_loss=float(curves.keys[rank]),
            value_loss=float(curves.values[rank]),
        )

    def _past(self, layer: Layer, x: Tensor) -> Tensor:
        """A stream [N, S, hidden] past a layer."""
        passed = x.clone()
        attention_windows.advance(layer, passed, self._decoder.rope)
        return passed

    @torch.no_grad()
    def _finish(self) -> None:
        trained, *disturbed = self._forks
        divergences = iter([self._kl(trained, each) for each in disturbed])
        for layer, lost in self._found:
            by_values, *by_keys = (_sensitivity(next(divergences), loss) for loss in lost)
            by_method = dict(zip(self._methods, by_keys, strict=True))
            self.layers.append(replace(layer, key_sensitivity=by_method, value_sensitivity=by_values))

    def _kl(self, trained: Tensor, disturbed: Tensor) -> float:
        meter = DivergenceMeter()
        for at in range(len(trained)):
            one = slice(at, at + 1)
            original, found = (reference.logits(self._decoder, each[one]) for each in (trained, disturbed))
            meter.add(original, found, self._tried[one])
        return meter.finish().mean_kl


def _sensitivity(kl: float, loss: float) -> float:
    return kl / loss if loss > 0 else 0.0  # a layer whose attention gives nothing has nothing to lose


def analyze_sensitivity(
    decoder: Decoder,
    windows: Tensor,
    methods: Sequence[Method],
    sizes: Sequence[int],
    ratio: float,
    moments_of: Callable[[int], Moments] | None = None,
    capacity: int | None = None,
) -> SensitivityAnalysis:
    """Measure every layer, each when asked for.

    Args:
        methods: matched ones, whose losses are known beforehand.
        sizes: how many heads may share one, ascending; trials take the largest that an engine's widest head has room for.
        ratio: share of the KV bytes that trials keep, and that heads are matched for.
        windows, moments_of, capacity: as `convert` takes them.
    """
    return SensitivityAnalysis(decoder, windows, methods, sizes, ratio, moments_of, capacity)


def sum_of(parts: Iterator[Tensor]) -> Tensor:
    """Their sum."""
    return torch.stack(list(parts)).sum(0)
