"""What conversion could cost, layer by layer, before any layer is converted: losses at every width, and what they do.

Each layer's keys, and apart from them its values, are coded once on trial, and the stream that this disturbs runs on
to the logits beside the trained one: so much KL for so much error of the attention output is the layer's sensitivity.
One layer is in memory at a time, and one stream of a few windows for each trial. Knows how trials run; chooses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvexport import reference
from kvexport.calibrate import Moments, over_positions
from kvexport.calibrate import windows as attention_windows
from kvexport.convert.apply import LayerCode, apply_code
from kvexport.convert.codes import Code
from kvexport.convert.groups import Grouping, Shape, trained_shape
from kvexport.convert.keys import online_codes
from kvexport.convert.losses import LayerLosses
from kvexport.convert.matching import Group, matched_groups, order_of
from kvexport.convert.methods import METHODS, folds
from kvexport.convert.permute import permuted, permuted_moments
from kvexport.convert.streams import TrainedStream
from kvexport.convert.values import weighted_codes
from kvexport.decoder import Attention, Decoder, Layer
from kvexport.divergence import DivergenceMeter

_WINDOWS = 8  # that trials run over
_TINY = 1e-12  # of the output's power: no trial loses less


@dataclass(frozen=True)
class Curves:
    """Losses of one layer in groups of one size, summed over groups, at widths 0 to n = size·head_dim: [n + 1] each.

    Powers of the error of the attention output, E|Δo|².
    """

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class LayerSurvey:
    """What one layer could lose.

    Attributes:
        trained: what it caches now.
        curves: by group size.
        output_power: E|o - ō|², what the losses are to be compared with.
        key_sensitivity, value_sensitivity: mean KL in nats per token for a unit of loss through keys, through values.
    """

    trained: Shape
    curves: dict[int, Curves]
    output_power: float
    key_sensitivity: float
    value_sensitivity: float

    def kl(self, shape: Shape) -> float:
        """Predicted mean KL, nats per token, of this layer alone in that shape."""
        if shape == self.trained:
            return 0.0
        curves = self.curves[self.trained.kv_heads // shape.kv_heads]
        lost = self.key_sensitivity * curves.keys[shape.key_dim] + self.value_sensitivity * curves.values[shape.value_dim]
        return float(lost)


class Survey:
    """An iterator over the decoder's layers: `survey` describes it. `layers` is complete when it has ended."""

    @torch.no_grad()
    def __init__(
        self,
        decoder: Decoder,
        windows: Tensor,
        sizes: Sequence[int],
        ratio: float,
        moments_of: Callable[[int], Moments] | None,
        capacity: int | None,
    ) -> None:
        self._decoder, self._sizes, self._ratio = decoder, sizes, ratio
        self._moments_of, self._positions = moments_of, windows.shape[1] if capacity is None else capacity
        self._stream = TrainedStream(decoder, windows)
        seen = self._stream.seen
        self._tried = windows[torch.linspace(0, len(seen) - 1, min(_WINDOWS, len(seen))).round().long()]
        self._forks = [reference.embed(decoder.embedding, self._tried)]  # the trained stream, then two a layer
        self._found: list[tuple[Shape, dict[int, Curves], float, float, float]] = []
        self.layers: list[LayerSurvey] = []

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
        if self._decoder.rope is not None:
            moments = over_positions(moments, self._decoder.rope, self._positions)
        attention, curves = layer.attention, dict[int, Curves]()
        losses, trial = LayerLosses(moments, attention), None
        for size in self._sizes:
            groups = self._groups(losses, attention, size)
            curves[size] = Curves(sum_of(map(losses.keys, groups)), sum_of(map(losses.values, groups)))
            trial = groups
        assert trial is not None
        keys, values, key_loss, value_loss = self._trials(layer, moments, trial, curves[self._sizes[-1]])
        least = _TINY * float(moments.output_power)
        self._found.append(
            (trained_shape(attention), curves, float(moments.output_power), max(key_loss, least), max(value_loss, least))
        )
        disturbed = [self._past(each, self._forks[0]) for each in (keys, values)]
        self._forks = [self._past(layer, fork) for fork in self._forks] + disturbed
        self._stream.advance(layer)

    def _groups(self, losses: LayerLosses, attention: Attention, size: int) -> list[Group]:
        width = max(1, round(self._ratio * size * attention.head_dim))

        def loss(group: Group) -> float:
            return float(losses.keys(group)[width]) + float(losses.values(group)[width])

        return matched_groups(attention.num_kv_heads, size, loss)

    def _trials(
        self, layer: Layer, moments: Moments, groups: Sequence[Group], curves: Curves
    ) -> tuple[Layer, Layer, float, float]:
        """The layer with its keys coded, the layer with its values coded, and what they are predicted to lose."""
        order = order_of(groups)
        attention, moments = permuted(layer.attention, order), permuted_moments(moments, order)
        grouping = Grouping.of(attention, len(groups))
        n = grouping.size * grouping.head_dim
        rank = max(1, round(self._ratio * n))
        whole = Code(torch.eye(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64))
        all_groups = range(grouping.kv_heads)
        keys = tuple(online_codes(moments, grouping, group).code(rank) for group in all_groups)
        values = tuple(weighted_codes(moments, attention, grouping, group).code(rank) for group in all_groups)

        def coded(keys: tuple[Code, ...], values: tuple[Code, ...]) -> Layer:
            code = LayerCode(keys, values, folds(METHODS["online"], attention), centred=True)
            return replace(layer, attention=apply_code(attention, grouping, code, moments.value_mean))

        exact = (whole,) * grouping.kv_heads
        return coded(keys, exact), coded(exact, values), float(curves.keys[rank]), float(curves.values[rank])

    def _past(self, layer: Layer, x: Tensor) -> Tensor:
        """A stream [N, S, hidden] past a layer."""
        passed = x.clone()
        attention_windows.advance(layer, passed, self._decoder.rope)
        return passed

    @torch.no_grad()
    def _finish(self) -> None:
        trained, *disturbed = self._forks
        divergences = [self._kl(trained, each) for each in disturbed]
        for (shape, curves, power, key_loss, value_loss), by_keys, by_values in zip(
            self._found, divergences[::2], divergences[1::2], strict=True
        ):
            self.layers.append(LayerSurvey(shape, curves, power, by_keys / key_loss, by_values / value_loss))

    def _kl(self, trained: Tensor, disturbed: Tensor) -> float:
        meter = DivergenceMeter()
        for at in range(len(trained)):
            one = slice(at, at + 1)
            original, found = (reference.logits(self._decoder, each[one]) for each in (trained, disturbed))
            meter.add(original, found, self._tried[one])
        return meter.finish().mean_kl


def survey(
    decoder: Decoder,
    windows: Tensor,
    sizes: Sequence[int],
    ratio: float,
    moments_of: Callable[[int], Moments] | None = None,
    capacity: int | None = None,
) -> Survey:
    """Measure every layer, each when asked for.

    Args:
        sizes: how many heads may share one, ascending; trials take the last.
        ratio: share of the KV bytes that trials keep, and that heads are matched for.
        windows, moments_of, capacity: as `convert` takes them.
    """
    return Survey(decoder, windows, sizes, ratio, moments_of, capacity)


def sum_of(parts: Iterator[Tensor]) -> Tensor:
    """Their sum."""
    return torch.stack(list(parts)).sum(0)
