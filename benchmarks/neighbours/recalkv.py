"""ReCalKV (Yan et al., arXiv 2505.24357): heads reordered by similarity for the keys, calibrated factors for
the values.

- Keys, head-wise similarity-aware reordering: linear CKA between the heads' key activations (centred over
  tokens; the released code takes it of the whitened weights), greedy groups of 4, then Palu's whitened SVD of
  each group before rotation, rebuilt at every step. The order is undone when keys are rebuilt, so nothing
  else moves.
- Values: one whitened SVD of the whole layer, as in the released code (L folds into W_O, so no group bounds
  the rebuilding), then offline value calibration: R fixed, L refitted to the value activations by least
  squares, then R = pinv(L) W; one round, the released default. The activations are those of the stream that
  the layers converted before have left, as released: on the data of the SVD itself a round changes nothing.

Ranks are uniform; the paper takes Palu's Fisher search (`recalkv-fisher`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvexport.model.decoder import Attention, Decoder, Layer

from .grouping import greedy_groups, group_size
from .low_rank import grouped, rebuilding_layer, whitened
from .result import Neighbour, NeighbourLayer, convert_layers, whole
from .stream import LayerMoments, Stream

ROUNDS = 1
ROUNDING = "rank of a key group, and of the layer's values, rounded down"


def recalkv(decoder: Decoder, windows: Tensor, kv_ratio: float) -> Neighbour:
    """ReCalKV at `kv_ratio` of the trained KV numbers, calibrated on windows [N, S] of token ids."""
    converted = Stream(decoder, windows)

    def convert(layer: Layer, moments: LayerMoments, stream: Stream) -> NeighbourLayer:
        attention = layer.attention
        heads, width = attention.num_kv_heads, attention.head_dim
        ranks = whole(kv_ratio * group_size(heads) * width), whole(kv_ratio * heads * width)
        return recalkv_layer(layer, moments, converted, *ranks)

    return Neighbour("recalkv", decoder, convert_layers(decoder, windows, convert), ROUNDING)


def recalkv_layer(
    layer: Layer, moments: LayerMoments, converted: Stream, key_rank: int, value_rank: int
) -> NeighbourLayer:
    """One layer at these ranks, of a key group and of all values; takes the converted stream past it."""
    attention = layer.attention
    groups = greedy_groups(key_similarity(attention, moments), group_size(attention.num_kv_heads))
    key = grouped(attention.k.weight.double(), moments.second, groups, attention.head_dim, key_rank)
    weight = attention.v.weight.double()
    left, right = whitened(weight, moments.second, value_rank)
    left, right = calibrate(weight, left, right, converted.measure(layer).second)
    made = rebuilding_layer(layer, key, left @ right, len(groups), key_rank, 1, value_rank)
    converted.advance(made.layer)
    return made


def key_similarity(attention: Attention, moments: LayerMoments) -> Tensor:
    """Linear CKA of the heads' keys before rotation, |C_ij|² / (|C_ii| |C_jj|) of their covariances: [h,
    h]."""
    mean = moments.means(attention.k)
    covariance = moments.outputs(attention.k) - torch.outer(mean, mean)
    heads = attention.num_kv_heads
    power = covariance.unflatten(0, (heads, -1)).unflatten(2, (heads, -1)).square().sum((1, 3))  # [h, h]
    own = power.diagonal().clamp_min(torch.finfo(power.dtype).tiny).sqrt()
    return power / torch.outer(own, own)


def calibrate(weight: Tensor, left: Tensor, right: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """L and R after `ROUNDS` of least squares on inputs with E[x xᵀ] = `inputs`; see the module's
    docstring."""
    for _ in range(ROUNDS):
        latent = right @ inputs @ right.T
        left = weight @ inputs @ right.T @ torch.linalg.pinv(latent, hermitian=True)
        right = torch.linalg.pinv(left) @ weight
    return left, right
