"""Trials of a layer: its keys alone or its values alone are coded, and its loss is predicted from moments.

The sensitivity analysis divides the KL that the error of such a trial causes by its predicted loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvexport.calibrate import Moments
from kvexport.convert.apply import LayerCode, apply_code
from kvexport.convert.code_moments import CodeMoments, make_code_moments
from kvexport.convert.codes import Code
from kvexport.convert.groups import WIDEST, Grouping, KVShape
from kvexport.convert.layer_sensitivity import Curves
from kvexport.convert.losses import LayerLosses, ValueLosses
from kvexport.convert.matching import Group, order_of
from kvexport.convert.methods import Method, in_layer, layer_code
from kvexport.convert.permute import permute_heads
from kvexport.model.decoder import Attention

_RATIO = 0.5  # share of the KV bytes that trials keep, and for which heads are matched
_TINY = 1e-12  # of the output's power: lower bound on the loss of a trial


@dataclass(frozen=True)
class Trial:
    """An attention of which one side is coded, and its predicted loss E|Δo|²."""

    attention: Attention
    loss: float


@dataclass(frozen=True)
class LayerTrials:
    """Losses of one layer for every method and group size, and its trials.

    Attributes:
        curves: losses by method and group size.
        values: the trial of values, in the groups of the first method.
        keys: the trial of keys of each method.
    """

    curves: dict[tuple[Method, int], Curves]
    values: Trial
    keys: dict[Method, Trial]

    @property
    def all(self) -> list[Trial]:
        """The trial of values, then those of keys."""
        return [self.values, *self.keys.values()]


def make_trials(
    attention: Attention, moments: Moments, methods: Sequence[Method], sizes: Sequence[int], positions: int
) -> LayerTrials:
    """Predict the losses of one layer, and code its keys and its values at half of the KV bytes.

    Args:
        attention: the unconverted layer.
        moments: its moments.
        methods: methods that match heads; they predict their losses.
        sizes: group sizes, ascending. Trials use the largest whose width fits an engine's widest head.
        positions: positions of the deployed context.
    """
    curves, keys, values = dict[tuple[Method, int], Curves](), dict[Method, Trial](), list[Trial]()
    trial_size = max((size for size in sizes if _rank(size, attention) <= WIDEST), default=sizes[0])
    least = _TINY * float(moments.output_power)
    value_losses = ValueLosses(moments, attention)  # matching needs those of many groups, for each method
    for chosen in methods:
        method = in_layer(chosen, attention)
        code_moments = make_code_moments(method.before_rotation, moments, attention, positions)
        losses = LayerLosses(code_moments, attention, value_losses)
        for size in sizes:
            rank = _rank(size, attention)
            groups = losses.match(method.before_rotation, size, rank, rank)
            of_keys = losses.folded_keys if method.key is None else losses.keys
            of_size = Curves(_sum(map(of_keys, groups)), _sum(map(losses.values, groups)))
            curves[chosen, size] = of_size
            if size == trial_size:
                coded = _Coded(attention, code_moments, method, groups)
                keys[chosen] = Trial(coded.keys(), max(float(of_size.keys[coded.rank]), least))
                if not values:
                    values.append(Trial(coded.values(), max(float(of_size.values[coded.rank]), least)))
    return LayerTrials(curves, values[0], keys)


class _Coded:
    """The codes of a trial, and the attention with one side of them applied."""

    def __init__(
        self, attention: Attention, code_moments: CodeMoments, method: Method, groups: Sequence[Group]
    ) -> None:
        order = order_of(groups)
        self._attention, self._moments = permute_heads(attention, order), code_moments.permute_heads(order)
        self._grouping = Grouping.of(attention, len(groups))
        self.rank = min(_rank(self._grouping.size, attention), WIDEST)
        shape = KVShape(self._grouping.kv_heads, self.rank, self.rank)
        self._code = layer_code(method, self._moments, self._attention, self._grouping, shape)
        identity = torch.eye(self._grouping.size * self._grouping.head_dim, dtype=torch.float64)
        self._exact = (Code(identity, identity),) * self._grouping.kv_heads

    def keys(self) -> Attention:
        """The attention with coded keys and exact values."""
        return self._apply(replace(self._code, values=self._exact))

    def values(self) -> Attention:
        """The attention with coded values and exact keys."""
        return self._apply(replace(self._code, keys=self._exact, folds=False, frequencies=None))

    def _apply(self, code: LayerCode) -> Attention:
        return apply_code(self._attention, self._grouping, code, self._moments.moments.value_mean)


def _rank(size: int, attention: Attention) -> int:
    """The even width of a cached head that keeps the ratio of the KV bytes, in groups of `size`."""
    return max(2, 2 * round(_RATIO * size * attention.head_dim / 2))


def _sum(parts: Iterator[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)
