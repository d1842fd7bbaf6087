"""Codes put into a layer: folded into its weights where that is exact, as maps after rotation where it is not.

Knows the shapes of the neutral attention; must not know how a code was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvexport.convert.codes import Code
from kvexport.convert.groups import Grouping
from kvexport.convert.values import lost_constant
from kvexport.model.decoder import Attention, Linear


@dataclass(frozen=True)
class LayerCode:
    """The codes of all groups of one layer, and how they are put in."""

    keys: tuple[Code, ...]
    values: tuple[Code, ...]
    folds: bool  # the key codes go into W_Q and W_K
    centred: bool  # the mean value is kept exactly, through the output bias
    frequencies: Tensor | None = (
        None  # of the cached pairs of keys that rotate, [key_dim/2]; None: those of a trained head
    )


def apply_code(attention: Attention, grouping: Grouping, code: LayerCode, value_mean: Tensor) -> Attention:
    """The layer with `grouping.kv_heads` cached heads; `value_mean` [h·head_dim] is used where the code is centred.

    A decoder goes into W_Q or W_O only where that makes the weights no larger: with wide groups it stays a map.
    """
    converted = replace(
        attention, num_kv_heads=grouping.kv_heads, **_values(attention, grouping, code, value_mean)
    )
    dtype = attention.k.weight.dtype
    decoders = _decoders(grouping, code.keys)  # [H, d, r]
    if not code.folds:
        key_map = torch.stack([each.encode for each in code.keys])  # [G, t·d, r]
        return replace(converted, key_map=key_map.to(dtype), query_map=decoders.to(dtype))
    converted = replace(converted, k=_encode(attention.k, [each.encode for each in code.keys]))
    if code.frequencies is not None or not _folds(
        attention.q.weight.shape[1], decoders.shape[1], decoders.shape[2]
    ):
        return replace(converted, query_map=decoders.to(dtype), frequencies=code.frequencies)
    return replace(converted, q=_encode(attention.q, list(decoders)), head_dim=decoders.shape[2])


def _folds(hidden: int, width: int, rank: int) -> bool:
    """Whether a matrix [hidden, rank] a head is no larger than one [hidden, width] and a map [width, rank]."""
    return hidden * rank <= hidden * width + width * rank


def _decoders(grouping: Grouping, codes: Sequence[Code]) -> Tensor:
    """U_h of each query head's own member of its group, [H, head_dim, r]."""
    heads = ((code, head) for group, code in enumerate(codes) for head in grouping.query_heads(group))
    return torch.stack([code.decode[grouping.member(head)] for code, head in heads])


def _values(attention: Attention, grouping: Grouping, code: LayerCode, value_mean: Tensor) -> dict[str, Any]:
    """W_V encoded; W_O with the decoders folded in, o = Σ_h W_O^h U_h c, or a map before it; a bias for what the means lose."""
    o, dtype = attention.o, attention.o.weight.dtype
    decoders, value_map = _decoders(grouping, code.values), None  # [H, d, r]
    weight, bias = o.weight, o.bias
    if _folds(weight.shape[0], *decoders.shape[1:]):
        by_head = weight.double().unflatten(1, (-1, grouping.head_dim))  # [hidden, H, d]
        weight = torch.einsum("ohd,hdr->ohr", by_head, decoders).flatten(1).to(dtype)
    else:
        value_map = decoders.transpose(1, 2).contiguous().to(dtype)
    if code.centred:
        lost = lost_constant(attention, grouping, code.values, value_mean)
        bias = (lost if bias is None else bias.double() + lost).to(dtype)
    v = _encode(attention.v, [each.encode for each in code.values])
    return {"v": v, "o": Linear(weight, bias), "value_map": value_map}


def _encode(linear: Linear, encoders: list[Tensor]) -> Linear:
    """Eᵀ W and Eᵀ b for consecutive blocks of rows, one encoder [rows, r] each."""
    weight = linear.weight.double().unflatten(0, (len(encoders), -1))
    rows = torch.cat([encoder.T @ block for encoder, block in zip(encoders, weight, strict=True)])
    bias = None
    if linear.bias is not None:
        parts = linear.bias.double().unflatten(0, (len(encoders), -1))
        bias = torch.cat([encoder.T @ part for encoder, part in zip(encoders, parts, strict=True)]).to(
            linear.bias.dtype
        )
    return Linear(rows.to(linear.weight.dtype), bias)
