"""Application of codes to a layer: folded into weights where that is exact, as maps in the graph elsewhere.

    values            W_V' = Eᵀ W_V, W_O' = W_O U per query head, exact without a clip after W_V
                      (arXiv 2406.07056, eqs. 7-14)
    keys before RoPE  W_K' = Eᵀ W_K, W_Q' = Uᵀ W_Q per query head
    keys after RoPE   key_map E on each new key, query_map U on each new query (arXiv 2406.07056, eqs. 17-18)

A decoder U that would make a weight larger than the weight and a map together stays a map.
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
    """Codes of all groups of one layer, and how they are applied.

    Attributes:
        keys: key code of each group.
        values: value code of each group.
        folds: whether the key codes go into W_Q and W_K.
        centred: whether the mean value is kept exactly, through the output bias.
        frequencies: index of the RoPE frequency of each cached pair, [key_dim/2] int64; None: those of a
            trained head.
    """

    keys: tuple[Code, ...]
    values: tuple[Code, ...]
    folds: bool
    centred: bool
    frequencies: Tensor | None = None


def apply_code(attention: Attention, grouping: Grouping, code: LayerCode, value_mean: Tensor) -> Attention:
    """Apply the codes of a layer.

    Args:
        attention: the unconverted layer, with the heads of each group adjacent.
        grouping: the groups.
        code: their codes.
        value_mean: mean value [h·d] float64, used where the code is centred.

    Returns:
        The layer with `grouping.kv_heads` cached heads, in the dtype of its weights.
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
    """Whether [hidden, rank] per head is no larger than [hidden, width] and a map [width, rank]."""
    return hidden * rank <= hidden * width + width * rank


def _decoders(grouping: Grouping, codes: Sequence[Code]) -> Tensor:
    """U's rows of each query head's own trained KV head, [H, d, r]."""
    heads = ((code, head) for group, code in enumerate(codes) for head in grouping.query_heads(group))
    return torch.stack([code.decode[grouping.member(head)] for code, head in heads])


def _values(attention: Attention, grouping: Grouping, code: LayerCode, value_mean: Tensor) -> dict[str, Any]:
    """Fields `v` or `value_encoder`, `o` and `value_map`.

    W_V is encoded, or, if values are clipped after it, followed by the encoder. Decoders are in W_O or in a
    map before it, lost means in the bias.
    """
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
    fields: dict[str, Any] = {"o": Linear(weight, bias), "value_map": value_map}
    encoders = [each.encode for each in code.values]
    if attention.clip is None:
        return {**fields, "v": _encode(attention.v, encoders)}
    return {**fields, "value_encoder": torch.stack(encoders).to(dtype)}


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
