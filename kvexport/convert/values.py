"""Codes for values, one function a method; each takes a layer's moments and weights and codes one group.

Knows what a value is for: an average under attention, then W_O. Must not know how a code is put into a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvexport.calibrate import Moments
from kvexport.convert.codes import Code, optimal_code, subspace_code
from kvexport.convert.groups import Grouping
from kvexport.convert.keys import mean_code, weight_subspace
from kvexport.decoder import Attention


def member_output(attention: Attention, grouping: Grouping, group: int, head: int) -> Tensor:
    """W_O of one query head, from the group's stacked values to the output: [hidden, n] float64."""
    width = grouping.head_dim
    out = torch.zeros(attention.o.weight.shape[0], grouping.size * width, dtype=torch.float64)
    out[:, grouping.member(head)] = attention.o.weight[:, head * width : (head + 1) * width].double()
    return out


def output_weights(moments: Moments, attention: Attention, grouping: Grouping, group: int) -> Tensor:
    """S of a group's stacked values, [n, n]: Σ_qq' ρ_qq' W_Oᵀ W_O', ρ how alike two heads attend."""
    heads = list(grouping.query_heads(group))
    width, n = grouping.head_dim, grouping.size * grouping.head_dim
    outputs = attention.o.weight[:, heads[0] * width : (heads[-1] + 1) * width].double()  # [hidden, heads·d]
    overlap = moments.overlap[heads][:, heads].repeat_interleave(width, 0).repeat_interleave(width, 1)
    full = (outputs.T @ outputs) * overlap  # [heads·d, heads·d]
    weights = torch.zeros(n, n, dtype=torch.float64)
    for a, head_a in enumerate(heads):
        for b, head_b in enumerate(heads):
            block = full[a * width : (a + 1) * width, b * width : (b + 1) * width]
            weights[grouping.member(head_a), grouping.member(head_b)] += block
    return weights


def weighted(moments: Moments, attention: Attention, grouping: Grouping, group: int) -> Code:
    """Centred code weighted by W_O and by how alike heads attend; attention rows sum to one, so centring is exact."""
    rows = grouping.rows(group)
    return optimal_code(
        output_weights(moments, attention, grouping, group), moments.value_covariance[rows, rows], grouping.head_dim
    )


def svd_a(moments: Moments, attention: Attention, grouping: Grouping, group: int) -> Code:
    """The paper's SVD of the cached values, unweighted and uncentred (arXiv 2406.07056, eqs. 7-14)."""
    rows = grouping.rows(group)
    return subspace_code(moments.value_second[rows, rows], grouping.head_dim)


def svd_w(moments: Moments, attention: Attention, grouping: Grouping, group: int) -> Code:
    """SVD of the group's concatenated W_V; no data."""
    return weight_subspace(attention.v.weight[grouping.rows(group)], grouping.head_dim)


def mean_pool(moments: Moments, attention: Attention, grouping: Grouping, group: int) -> Code:
    """The mean of the group's heads."""
    return mean_code(grouping)
