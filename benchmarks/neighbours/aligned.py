"""Aligned-head merging (Jin et al., EMNLP Findings 2025, arXiv 2412.20677): heads turned alike, then
averaged.

Turning a value head by any orthogonal matrix, or a key head by a rotation of each rotary pair, changes
nothing once W_O or W_Q turns too. So the heads of a group are turned towards their mean (generalised
Procrustes analysis, from moments), keys before rotation, and W_K and W_V averaged: a standard GQA layer.
Groups are found by annealed swaps on the distance of value heads after pairwise alignment, the released
default. `renorm` scales the mean back to the mean Frobenius norm of its members, which the paper does not do.
The paper then prunes and distils; this is where it starts.

Heads merge as many to one everywhere, so the KV heads left are the largest divisor of the trained number
within the budget.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import Tensor

from kvexport.calibrate import windows as attention_windows
from kvexport.model.decoder import Attention, Decoder, Layer, Linear

from .grouping import annealed_groups
from .result import (
    Neighbour,
    NeighbourLayer,
    attention_macs,
    attention_parameters,
    convert_layers,
    require_plain_keys,
    whole,
)
from .stream import LayerMoments, Stream, augmented

ROUNDS, ENOUGH = 100, 1e-9
ROUNDING = "KV heads rounded down to a divisor of the trained number"


def aligned_mean(decoder: Decoder, windows: Tensor, kv_ratio: float, renorm: bool = False) -> Neighbour:
    """Merging at `kv_ratio` of the trained KV numbers, calibrated on windows [N, S] of token ids."""

    def convert(layer: Layer, moments: LayerMoments, stream: Stream) -> NeighbourLayer:
        require_plain_keys(layer.attention, "aligned-head merging")
        heads = layer.attention.num_kv_heads
        most = whole(kv_ratio * heads)
        left = next(count for count in range(min(most, heads), 0, -1) if heads % count == 0)
        groups = annealed_groups(value_similarity(layer.attention, moments), heads // left)
        attention = merged(layer.attention, moments, groups, renorm)
        return NeighbourLayer(
            dataclasses.replace(layer, attention=attention),
            partial(attention_windows.attend, attention),
            attention.kv_width,
            attention_macs(attention),
            attention_parameters(attention),
        )

    name = "aligned-mean-renorm" if renorm else "aligned-mean"
    return Neighbour(name, decoder, convert_layers(decoder, windows, convert), ROUNDING)


def value_similarity(attention: Attention, moments: LayerMoments) -> Tensor:
    """-E|v_i Q - v_j|² at the best orthogonal Q, [h, h]."""
    heads = attention.num_kv_heads
    cross = blocks(moments.outputs(attention.v), heads)
    power = torch.stack([cross[i, i].trace() for i in range(heads)])
    return 2 * torch.linalg.svdvals(cross).sum(-1) - power[:, None] - power[None, :]


def blocks(moment: Tensor, heads: int) -> Tensor:
    """[h·d, h·d] as [h, h, d, d]."""
    return moment.unflatten(0, (heads, -1)).unflatten(2, (heads, -1)).transpose(1, 2)


def pairs(stack: Tensor) -> Tensor:
    """Rotary pairs of [..., d, n] as complex numbers: [..., d/2, n]."""
    first, second = stack.chunk(2, dim=-2)
    return torch.complex(first, second)


def unpaired(stack: Tensor) -> Tensor:
    """[..., d/2, n] complex as [..., d, n]."""
    return torch.cat((stack.real, stack.imag), dim=-2)


def pair_products(cross: Tensor) -> Tensor:
    """E[z_i conj(z_j)] of every rotary pair, [t, t, d/2] complex, from E[k_i k_jᵀ] [t, t, d, d]."""
    half = cross.shape[-1] // 2
    xx, xy = (cross[..., :half, at].diagonal(dim1=-2, dim2=-1) for at in (slice(half), slice(half, None)))
    yx, yy = (cross[..., half:, at].diagonal(dim1=-2, dim2=-1) for at in (slice(half), slice(half, None)))
    return torch.complex(xx + yy, yx - xy)


def value_turns(cross: Tensor) -> Tensor:
    """Orthogonal Q [t, d, d] that bring the v_i Q_i of a group close to their mean; `cross` is E[v_i v_jᵀ]
    [t, t, d, d]."""
    target, last = cross[:, 0], -torch.inf  # E[v_i mᵀ] [t, d, d]; the first head stands in for the mean m
    for _ in range(ROUNDS):
        left, _, right = torch.linalg.svd(target)
        turns = left @ right
        target = torch.einsum("ijde,jef->idf", cross, turns) / len(cross)
        alike = float((target * turns).sum())
        if alike - last <= ENOUGH * abs(alike):
            break
        last = alike
    return turns


def key_turns(products: Tensor) -> Tensor:
    """Unit phases u [t, d/2], complex, that bring the u_i z_i of a group close to their mean; of
    `pair_products`."""
    target, last = products[:, 0], -torch.inf
    for _ in range(ROUNDS):
        turns = torch.polar(torch.ones_like(target.real), -target.angle())
        target = torch.einsum("ijf,jf->if", products, turns.conj()) / len(products)
        alike = float((target * turns).real.sum())
        if alike - last <= ENOUGH * abs(alike):
            break
        last = alike
    return turns


def merged(attention: Attention, moments: LayerMoments, groups: list[list[int]], renorm: bool) -> Attention:
    """The attention with one KV head for each group; query heads follow their KV head."""
    heads, width = attention.num_kv_heads, attention.head_dim
    key, value = (
        augmented(each).unflatten(0, (heads, width)) for each in (attention.k, attention.v)
    )  # [h, d, hidden + 1]
    query = augmented(attention.q).unflatten(0, (heads, -1, width))  # [h, G, d, hidden + 1]
    output = attention.o.weight.double().unflatten(1, (heads, -1, width))  # [hidden, h, G, d]
    key_products = pair_products(blocks(moments.outputs(attention.k), heads))
    value_cross = blocks(moments.outputs(attention.v), heads)
    keys, values, queries, outputs = [], [], [], []
    for group in groups:
        phases = key_turns(key_products[group][:, group])[:, :, None]  # [t, d/2, 1]
        keys.append(_mean(unpaired(phases * pairs(key[group])), renorm))
        queries.append(unpaired(phases[:, None] * pairs(query[group])).flatten(0, 2))
        turns = value_turns(value_cross[group][:, group])
        values.append(_mean(turns.transpose(1, 2) @ value[group], renorm))
        outputs.append(torch.einsum("otgd,tde->otge", output[:, group], turns).flatten(1))
    return dataclasses.replace(
        attention,
        q=_linear(attention.q, torch.cat(queries)),
        k=_linear(attention.k, torch.cat(keys)),
        v=_linear(attention.v, torch.cat(values)),
        o=dataclasses.replace(attention.o, weight=torch.cat(outputs, dim=1).to(attention.o.weight)),
        num_kv_heads=len(groups),
    )


def _mean(heads: Tensor, renorm: bool) -> Tensor:
    """Mean of [t, d, n]; with `renorm` as long as its members are on average."""
    mean = heads.mean(0)
    return mean * (heads.flatten(1).norm(dim=1).mean() / mean.norm()) if renorm else mean


def _linear(like: Linear, weight: Tensor) -> Linear:
    """From [W b]."""
    weight = weight.to(like.weight)
    return Linear(weight[:, :-1].contiguous(), None if like.bias is None else weight[:, -1].contiguous())
