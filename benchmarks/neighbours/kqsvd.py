"""KQ-SVD (Lesens et al., arXiv 2512.05916): the best rank-r K Qᵀ per KV head, keys projected after rotation.

K = U_K R_K and Q = U_Q R_Q; of R_K R_Qᵀ = U Σ Vᵀ the leading r: keys take A = R_Qᵀ V Σ⁻¹, queries B = R_Kᵀ U.
Any R with RᵀR = KᵀK will do, so the square roots of the second moments stand in for the triangular factors.
Values are treated alike with the rows of W_O for the queries: their A folds into W_V, their B into W_O. The
result is an ordinary converted `Attention`: key_map and query_map are A and B, both online.

Query heads that share a KV head are stacked, their W_O too (the released code averages the latter).
"""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import Tensor

from kvexport.calibrate import windows as attention_windows
from kvexport.model.decoder import Attention, Decoder, Layer, Linear

from .result import Neighbour, NeighbourLayer, attention_macs, attention_parameters, convert_layers, halves
from .stream import LayerMoments, Stream

ROUNDING = "ranks of a head, half to keys and half to values, rounded down together"
_NOTHING = 1e-12  # of the largest singular value


def kqsvd(decoder: Decoder, windows: Tensor, kv_ratio: float) -> Neighbour:
    """KQ-SVD at `kv_ratio` of the trained KV numbers, calibrated on windows [N, S] of token ids."""

    def convert(layer: Layer, moments: LayerMoments, stream: Stream) -> NeighbourLayer:
        attention = projected(layer.attention, moments, *halves(2 * kv_ratio * layer.attention.head_dim))
        return NeighbourLayer(
            dataclasses.replace(layer, attention=attention),
            partial(attention_windows.attend, attention),
            attention.kv_width,
            attention_macs(attention),
            attention_parameters(attention),
        )

    return Neighbour("kq-svd", decoder, convert_layers(decoder, windows, convert), ROUNDING)


def projected(attention: Attention, moments: LayerMoments, key_rank: int, value_rank: int) -> Attention:
    """The attention with keys and values of these numbers a head."""
    heads, shared = attention.num_kv_heads, attention.queries_per_kv_head
    outputs = attention.o.weight.double().unflatten(1, (heads, shared, -1))  # [hidden, h, G, d]
    sensitivity = torch.einsum("ohgd,ohge->hde", outputs, outputs)
    values = moments.outputs(attention.v).unflatten(0, (heads, -1)).unflatten(2, (heads, -1))  # [h, d, h, d]
    key_map, query_map, value_in, value_out = [], [], [], []
    for head in range(heads):
        down, up = interaction(moments.keys[head], moments.queries[head], key_rank)
        key_map.append(down)
        query_map += [up] * shared
        down, up = interaction(values[head, :, head], sensitivity[head], value_rank)
        value_in.append(down)
        value_out.append(outputs[:, head] @ up)  # [hidden, G, r]
    dtype, down = attention.q.weight.dtype, torch.block_diag(*value_in)  # [h·d, h·r]
    bias = None if attention.v.bias is None else (attention.v.bias.double() @ down).to(dtype)
    return dataclasses.replace(
        attention,
        v=Linear((down.T @ attention.v.weight.double()).to(dtype), bias),
        o=dataclasses.replace(attention.o, weight=torch.cat(value_out, dim=1).flatten(1).to(dtype)),
        key_map=torch.stack(key_map).to(dtype),
        query_map=torch.stack(query_map).to(dtype),
    )


def interaction(cached: Tensor, asked: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [d, r] and B [d, r] for which k A (q B)ᵀ is the best rank-r k qᵀ, of second moments [d, d] of k and
    q."""
    cached_root, asked_root = _root(cached), _root(asked)
    left, singular, right = torch.linalg.svd(cached_root @ asked_root)
    inverse = torch.where(singular > _NOTHING * singular[0], 1 / singular, torch.zeros_like(singular))
    return (asked_root @ right.T * inverse)[:, :rank], (cached_root @ left)[:, :rank]


def _root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T
