"""Low-rank projections of head groups, and decoding from their latents with rebuilt keys, for Palu and
ReCalKV."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from kvexport.calibrate import windows as attention_windows
from kvexport.model.decoder import Attention, Layer, Linear, tensors_of

from .result import Macs, NeighbourLayer


def leading(moment: Tensor, rank: int) -> Tensor:
    """The `rank` leading eigenvectors of a symmetric [n, n], largest first: [n, rank]."""
    return torch.linalg.eigh((moment + moment.T) / 2).eigenvectors.flip(1)[:, :rank]


def whitened(weight: Tensor, inputs: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L [out, rank] and R [rank, in], for which L R is the rank-`rank` optimum of E|(W - L R) x|² under E[x
    xᵀ] = `inputs`.

    The papers factor W S = U Σ Vᵀ with S Sᵀ = E[x xᵀ], and take L = U Σ^½, R = Σ^½ Vᵀ S⁻¹ of the leading
    part. Their product is U Uᵀ W, with U the leading eigenvectors of W S Sᵀ Wᵀ: so L = U, R = Uᵀ W here, and
    nothing is inverted.
    """
    left = leading(weight @ inputs @ weight.T, rank)
    return left, left.T @ weight


def rows_of(heads: Sequence[int], width: int) -> Tensor:
    """The rows of these heads in a stack of heads of `width`."""
    return torch.cat([torch.arange(head * width, (head + 1) * width) for head in heads])


def grouped(weight: Tensor, inputs: Tensor, groups: Sequence[Sequence[int]], width: int, rank: int) -> Tensor:
    """`weight` [h·width, hidden] float64 with each group of heads at its whitened rank-`rank` optimum."""
    rebuilt = torch.empty_like(weight)
    for group in groups:
        rows = rows_of(group, width)
        left, right = whitened(weight[rows], inputs, rank)
        rebuilt[rows] = left @ right
    return rebuilt


def rebuilding_layer(
    layer: Layer,
    key: Tensor,
    value: Tensor,
    key_groups: int,
    key_rank: int,
    value_groups: int,
    value_rank: int,
) -> NeighbourLayer:
    """A layer that caches R x and rebuilds keys, as an ordinary one with W = L R for its key and value
    weights.

    Caching R x and rebuilding L (R x) gives the numbers that caching W x gives, so nothing else is needed to
    measure the loss; costs are those of the latent form: per group of heads `key_rank` and `value_rank`
    numbers a token.

    Args:
        key, value: L R, float64 [h·d, hidden].
    """
    attention = layer.attention
    changed = dataclasses.replace(
        attention, k=_like(attention.k, key), v=_like(attention.v, value)
    )  # biases stay: a key's is added when it is rebuilt, a value's passes attention unchanged
    macs, parameters = _costs(
        attention, key_groups * key_rank, key_rank, value_groups * value_rank, value_rank
    )
    return NeighbourLayer(
        dataclasses.replace(layer, attention=changed),
        partial(attention_windows.attend, changed),
        key_groups * key_rank + value_groups * value_rank,
        macs,
        parameters,
    )


def _like(linear: Linear, weight: Tensor) -> Linear:
    return dataclasses.replace(linear, weight=weight.to(linear.weight))


def _costs(
    attention: Attention, key_latent: int, key_rank: int, value_latent: int, value_rank: int
) -> tuple[Macs, int]:
    """MACs and parameters: L of the keys (every head of a group from its latent), R of both, W_O with the
    values' L in it."""
    hidden, queries = attention.o.weight.shape[0], attention.num_heads * attention.head_dim
    keys = attention.num_kv_heads * attention.head_dim
    rebuild = keys * key_rank
    output = hidden * attention.num_heads * value_rank
    down = (key_latent + value_latent) * attention.q.weight.shape[1]
    macs = Macs(
        per_cached_token=rebuild + 2 * keys + queries + attention.num_heads * value_rank,
        per_new_token=attention.q.weight.numel() + down + output + 2 * queries,
    )
    folded = (
        attention.o.bias is not None or attention.v.bias is not None
    )  # the values' bias ends in that of W_O
    biases = (
        sum(each.bias.numel() for each in (attention.q, attention.k) if each.bias is not None)
        + hidden * folded
    )
    norms = sum(
        tensor.numel() for each in (attention.q_norm, attention.k_norm) for tensor in tensors_of(each)
    )
    return macs, attention.q.weight.numel() + rebuild + down + output + biases + norms
