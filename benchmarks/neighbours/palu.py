"""Palu (Chang et al., ICLR 2025, arXiv 2407.21118): grouped low-rank projections, keys rebuilt for every
cached token.

G-LRD with groups of 4 KV heads (the largest divisor up to 4), both for keys (before rotation) and for values:
whitened SVD of the group's weight, its latent cached; L of the values folds into W_O, keys are rebuilt and
rotated at every step. Ranks are uniform. The paper's own search gives a projection a rank in proportion to
its Fisher information; `palu-fisher` does (see `fisher`). The paper rounds ranks to multiples of 32, here
they are exact.
"""

from __future__ import annotations

from torch import Tensor

from kvexport.model.decoder import Decoder, Layer

from .grouping import adjacent, group_size
from .low_rank import grouped, rebuilding_layer
from .result import Neighbour, NeighbourLayer, convert_layers, halves
from .stream import LayerMoments, Stream

ROUNDING = "ranks of a group, half to keys and half to values, rounded down together"


def palu(decoder: Decoder, windows: Tensor, kv_ratio: float) -> Neighbour:
    """Palu at `kv_ratio` of the trained KV numbers, calibrated on windows [N, S] of token ids."""

    def convert(layer: Layer, moments: LayerMoments, stream: Stream) -> NeighbourLayer:
        width = group_size(layer.attention.num_kv_heads) * layer.attention.head_dim
        return palu_layer(layer, moments, *halves(2 * kv_ratio * width))

    return Neighbour("palu", decoder, convert_layers(decoder, windows, convert), ROUNDING)


def palu_layer(layer: Layer, moments: LayerMoments, key_rank: int, value_rank: int) -> NeighbourLayer:
    """One layer at these ranks per group."""
    attention = layer.attention
    heads, width = attention.num_kv_heads, attention.head_dim
    groups = adjacent(heads, group_size(heads))
    key = grouped(attention.k.weight.double(), moments.second, groups, width, key_rank)
    value = grouped(attention.v.weight.double(), moments.second, groups, width, value_rank)
    return rebuilding_layer(layer, key, value, len(groups), key_rank, len(groups), value_rank)
