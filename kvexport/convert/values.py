"""Codes for values, one function a method; each takes a layer's moments and weights and codes one group.

Knows what a value is for: an average under attention, then W_O. Must not know how a code is put into a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvexport.calibrate import Moments
from kvexport.convert.codes import Code, Codes, optimal_codes, subspace_code
from kvexport.convert.groups import Grouping
from kvexport.convert.keys import mean_code, weight_subspace
from kvexport.model.decoder import Attention


def lost_constant(
    attention: Attention, grouping: Grouping, codes: Sequence[Code], value_mean: Tensor
) -> Tensor:
    """W_O (v̄ - v̂) at the mean value [h·head_dim]: what the codes of all groups leave of it, [hidden] float64.

    Attention rows sum to one, so this is the same for every token.
    """
    missed = torch.cat([code.residual @ value_mean[grouping.rows(group)] for group, code in enumerate(codes)])
    spread = missed.unflatten(0, (-1, grouping.head_dim)).repeat_interleave(grouping.queries, dim=0)  # [H, d]
    return attention.o.weight.double() @ spread.flatten()


def output_weights(moments: Moments, attention: Attention, grouping: Grouping, group: int) -> Tensor:
    """S of a group's stacked values, [n, n]: Σ_qq' ρ_qq' W_Oᵀ W_O', ρ how alike two heads attend."""
    heads, (size, queries, width) = (
        grouping.query_heads(group),
        (grouping.size, grouping.queries, grouping.head_dim),
    )
    span = slice(heads.start, heads.stop)
    outputs = attention.o.weight[:, heads.start * width : heads.stop * width].double()  # [hidden, t·q·d]
    full = (outputs.T @ outputs).view(len(heads), width, len(heads), width)
    full *= moments.overlap[span, span][:, None, :, None]
    return full.view(size, queries, width, size, queries, width).sum((1, 4)).view(size * width, size * width)


def weighted_codes(moments: Moments, attention: Attention, grouping: Grouping, group: int) -> Codes:
    """Centred codes weighted by W_O and by how alike heads attend; attention rows sum to one, so centring is exact."""
    rows = grouping.rows(group)
    return optimal_codes(output_weights(moments, attention, grouping, group), moments.value_covariance(rows))


def weighted(moments: Moments, attention: Attention, grouping: Grouping, group: int, rank: int) -> Code:
    return weighted_codes(moments, attention, grouping, group).code(rank)


def svd_a(moments: Moments, attention: Attention, grouping: Grouping, group: int, rank: int) -> Code:
    """The paper's SVD of the cached values, unweighted and uncentred (arXiv 2406.07056, eqs. 7-14)."""
    rows = grouping.rows(group)
    return subspace_code(moments.value_second[rows, rows], rank)


def svd_w(moments: Moments, attention: Attention, grouping: Grouping, group: int, rank: int) -> Code:
    """SVD of the group's concatenated W_V; no data."""
    return weight_subspace(attention.v.weight[grouping.rows(group)], rank)


def mean_pool(moments: Moments, attention: Attention, grouping: Grouping, group: int, rank: int) -> Code:
    """The mean of the group's heads."""
    return mean_code(grouping)
