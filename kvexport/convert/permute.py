"""Reordering of KV heads, to make those of a group adjacent; the layer computes the same function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvexport.calibrate import Moments
from kvexport.model.decoder import Attention, Linear, Norm


def permute_heads(attention: Attention, order: Sequence[int]) -> Attention:
    """Move KV head `order[i]`, with the query heads that share it, to place i of an unconverted layer."""
    queries = _query_order(order, attention.queries_per_kv_head)
    slopes = attention.alibi_slopes
    return replace(
        attention,
        q=_rows(attention.q, queries),
        k=_rows(attention.k, order),
        v=_rows(attention.v, order),
        o=Linear(_blocks(attention.o.weight, queries, 1), attention.o.bias),
        alibi_slopes=None if slopes is None else slopes[list(queries)],
        q_norm=_norm(attention.q_norm, queries, attention),
        k_norm=_norm(attention.k_norm, order, attention),
    )


def _norm(norm: Norm | None, order: Sequence[int], attention: Attention) -> Norm | None:
    """A norm of queries or keys whose heads are reordered; one weight for all heads stays as it is."""
    if norm is None or norm.weight is None:
        return norm
    if norm.weight.ndim == 1 and attention.norm_over == "head":
        return norm
    bias = None if norm.bias is None else _blocks(norm.bias, order, 0)
    return replace(norm, weight=_blocks(norm.weight, order, 0), bias=bias)


def permute_moments(moments: Moments, order: Sequence[int]) -> Moments:
    """Moments of the layer that `permute_heads` returns for the same order."""
    kv_heads = len(order)
    queries = _query_order(order, len(moments.key_gain) // kv_heads)
    inside = torch.tensor(queries)

    def both(second: Tensor, by: Sequence[int]) -> Tensor:
        return _blocks(_blocks(second, by, 0), by, 1)

    return replace(
        moments,
        key_mean=_blocks(moments.key_mean, order, 0),
        key_second=both(moments.key_second, order),
        query_second=moments.query_second[inside],
        value_mean=_blocks(moments.value_mean, order, 0),
        value_second=both(moments.value_second, order),
        overlap=moments.overlap[inside][:, inside],
        key_gain=moments.key_gain[inside],
    )


def _query_order(order: Sequence[int], queries: int) -> list[int]:
    return [head * queries + each for head in order for each in range(queries)]


def _rows(linear: Linear, order: Sequence[int]) -> Linear:
    return linear.map_rows(lambda rows: _blocks(rows, order, 0))


def _blocks(x: Tensor, order: Sequence[int], dim: int) -> Tensor:
    """Reorder the equal blocks along `dim`."""
    return (
        x.unflatten(dim, (len(order), -1)).index_select(dim, torch.tensor(list(order))).flatten(dim, dim + 1)
    )
