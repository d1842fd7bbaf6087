"""Trials of a layer: its keys alone or its values alone are coded, and its loss is predicted from moments.

The sensitivity analysis divides the KL that the error of such a trial causes by its predicted loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvexport.calibrate import Moments
from kvexport.convert.code_moments import CodeMoments, make_code_moments
from kvexport.convert.codes import Code
from kvexport.convert.groups import WIDEST, Grouping
from kvexport.convert.layer_sensitivity import Curves
from kvexport.convert.losses import LayerLosses, value_losses
from kvexport.convert.matching import Group, order_of
from kvexport.convert.methods import Method, in_layer, make_key_codes, make_value_codes
from kvexport.convert.permute import permute_heads
from kvexport.convert.threads import one_thread_each
from kvexport.model.decoder import Attention
from kvexport.model.reference import Projected
from kvexport.model.rotation import rotary_tables, rotate, select

_RATIO = 0.5  # share of the KV bytes that trials keep, and for which heads are matched
_TINY = 1e-12  # of the output's power: lower bound on the loss of a trial


@dataclass(frozen=True)
class Trial:
    """Codes of one side of a layer's cache, and their predicted loss E|Δo|².

    Attributes:
        code: replaces keys and queries, or values, of the unconverted layer on whole windows by what the
            codes make of them.
        loss: the predicted loss.
    """

    code: Callable[[Projected], Projected]
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
    of_values = value_losses(moments, attention)  # matching needs those of many groups, for each method
    with one_thread_each():
        for chosen in methods:
            method = in_layer(chosen, attention)
            code_moments = make_code_moments(method.before_rotation, moments, attention, positions)
            losses = LayerLosses(code_moments, attention, of_values)
            of_keys = losses.folded_keys if method.key is None else losses.keys
            for size in sizes:
                rank = _rank(size, attention)
                groups = losses.match(method.before_rotation, size, rank, rank)
                of_size = Curves(of_keys(groups).sum(0), of_values(groups).sum(0))
                curves[chosen, size] = of_size
                if size == trial_size:
                    width = min(rank, WIDEST)
                    coder = _Coder(attention, code_moments, method, groups, width)
                    keys[chosen] = Trial(coder.keys(), max(float(of_size.keys[width]), least))
                    if not values:
                        values.append(Trial(coder.values(), max(float(of_size.values[width]), least)))
    return LayerTrials(curves, values[0], keys)


class _Coder:
    """Makes the codes of a trial."""

    def __init__(
        self,
        attention: Attention,
        code_moments: CodeMoments,
        method: Method,
        groups: Sequence[Group],
        width: int,
    ) -> None:
        order = order_of(groups)
        self._attention, self._moments = permute_heads(attention, order), code_moments.permute_heads(order)
        self._grouping, self._method, self._width = Grouping.of(attention, len(groups)), method, width
        self._order, self._place = torch.tensor(order), torch.tensor(order).argsort()

    def keys(self) -> Callable[[Projected], Projected]:
        """Codes of keys."""
        codes, frequencies = make_key_codes(
            self._method, self._moments, self._attention, self._grouping, self._width
        )
        if self._method.key is None:
            return self._folded_keys(codes, frequencies)

        def code(projected: Projected) -> Projected:
            return replace(projected, key_rotated=self._reconstruct(projected.key_rotated, codes))

        return code

    def values(self) -> Callable[[Projected], Projected]:
        """Codes of values."""
        grouping, moments = self._grouping, self._moments.moments
        codes = make_value_codes(self._method, moments, self._attention, grouping, self._width)
        offset = moments.value_mean.new_zeros(grouping.kv_heads, 1, grouping.size * grouping.head_dim)
        if self._method.centred:  # a constant passes through attention as through the output bias
            for group, each in enumerate(codes):
                offset[group] = each.residual @ moments.value_mean[grouping.rows(group)]

        def code(projected: Projected) -> Projected:
            return replace(projected, value=self._reconstruct(projected.value, codes, offset))

        return code

    def _folded_keys(
        self, codes: Sequence[Code], frequencies: Tensor | None
    ) -> Callable[[Projected], Projected]:
        """Codes of keys before RoPE. Each trained head gets a copy of the cached head of its group."""
        rope, grouping = self._attention.rope, self._grouping
        assert rope is not None
        if frequencies is None:
            frequencies = torch.arange(grouping.head_dim // 2)
        encode, decode = (
            torch.stack([getattr(each, name) for each in codes]) for name in ("encode", "decode")
        )
        by_head = decode.unflatten(1, (grouping.size, -1)).flatten(0, 1)[self._place]  # [h, d, r]
        of_query = by_head.repeat_interleave(grouping.queries, 0)

        def code(projected: Projected) -> Projected:
            query, key = projected.query, projected.key
            cos, sin = select(rotary_tables(rope, torch.arange(key.shape[2])[None], key.dtype), frequencies)
            tables = cos.to(key), sin.to(key)
            cached = rotate(self._stacks(key) @ encode.to(key), tables)  # [B, G, S, r]
            return replace(
                projected,
                query_rotated=rotate(query @ of_query.to(query), tables),
                key_rotated=cached[:, (self._place // grouping.size).to(key.device)],
            )

        return code

    def _stacks(self, heads: Tensor) -> Tensor:
        """Heads [B, h, S, d] as the stacks of their groups, [B, G, S, t·d]."""
        ordered = heads[:, self._order.to(heads.device)]
        return ordered.unflatten(1, (self._grouping.kv_heads, -1)).transpose(2, 3).flatten(3)

    def _reconstruct(self, heads: Tensor, codes: Sequence[Code], offset: Tensor | None = None) -> Tensor:
        """Heads [B, h, S, d] as their codes reconstruct them, plus an offset [G, 1, t·d]."""
        encode, decode = (
            torch.stack([getattr(each, name) for each in codes]) for name in ("encode", "decode")
        )
        stacks = self._stacks(heads) @ encode.to(heads) @ decode.mT.to(heads)
        if offset is not None:
            stacks = stacks + offset.to(heads)
        ordered = stacks.unflatten(3, (self._grouping.size, -1)).transpose(2, 3).flatten(1, 2)
        return ordered[:, self._place.to(heads.device)]


def _rank(size: int, attention: Attention) -> int:
    """The even width of a cached head that keeps the ratio of the KV bytes, in groups of `size`."""
    return max(2, 2 * round(_RATIO * size * attention.head_dim / 2))
