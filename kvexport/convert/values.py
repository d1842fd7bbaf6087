"""Codes of values: one function per method, each of which codes one group from the layer's moments and
weights.

A value enters the output as an average under attention, multiplied by W_O. With errors of different tokens
uncorrelated, E|Δo|² = tr(S · Cov(v - v̂)) over the group's stacked values, with

    S_hh' = Σ_q∈h Σ_q'∈h' ρ_qq' W_O^qᵀ W_O^q',    ρ_qq' = E_m Σ_n a_mn a'_mn (`Moments.overlap`).

Attention rows sum to one, so a constant passes through them unchanged: the code works on v - v̄, and what it
loses of v̄ is added to the output bias (`lost_constant`).
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
    """W_O (v̄ - v̂) at the mean value v̄ [h·d]: what the codes of all groups lose of it, [hidden] float64.

    It is the same for every token, because attention rows sum to one.
    """
    missed = torch.cat([code.residual @ value_mean[grouping.rows(group)] for group, code in enumerate(codes)])
    spread = missed.unflatten(0, (-1, grouping.head_dim)).repeat_interleave(grouping.queries, dim=0)  # [H, d]
    return attention.o.weight.double() @ spread.flatten()


def output_weights(moments: Moments, attention: Attention, grouping: Grouping, group: int) -> Tensor:
    """S of a group's stacked values, [t·d, t·d] float64 (see the module's formula)."""
    heads, (size, queries, width) = (
        grouping.query_heads(group),
        (grouping.size, grouping.queries, grouping.head_dim),
    )
    span = slice(heads.start, heads.stop)
    outputs = attention.o.weight[:, heads.start * width : heads.stop * width].double()  # [hidden, t·q·d]
    full = (outputs.T @ outputs).view(len(heads), width, len(heads), width)
    full *= moments.overlap[span, span][:, None, :, None]
    return full.view(size, queries, width, size, queries, width).sum((1, 4)).view(size * width, size * width)


def stacked_output_weights(moments: Moments, attention: Attention) -> Tensor:
    """S of the stacked values of all KV heads of a layer, [h·d, h·d] float64; that of a group is a block."""
    heads, queries, width = attention.num_heads, attention.queries_per_kv_head, attention.value_dim
    outputs, rows = attention.o.weight.double(), list[Tensor]()  # [hidden, H·d]
    for first in range(0, heads, queries):
        span = slice(first, first + queries)
        full = outputs[:, first * width : (first + queries) * width].T @ outputs
        full = full.view(queries, width, heads, width) * moments.overlap[span][:, None, :, None]
        rows.append(full.view(queries, width, -1, queries, width).sum((0, 3)).flatten(1))  # [d, h·d]
    return torch.cat(rows)


def weighted_codes(moments: Moments, attention: Attention, grouping: Grouping, group: int) -> Codes:
    """Optimal codes of centred values for S = `output_weights`, all ranks."""
    rows = grouping.rows(group)
    return optimal_codes(output_weights(moments, attention, grouping, group), moments.value_covariance(rows))


def weighted(moments: Moments, attention: Attention, grouping: Grouping, group: int, rank: int) -> Code:
    """Value code of the methods `online` and `fold`: the one of `weighted_codes` at this rank."""
    return weighted_codes(moments, attention, grouping, group).code(rank)


def weighted_uncentred(
    moments: Moments, attention: Attention, grouping: Grouping, group: int, rank: int
) -> Code:
    """Value code of `online` and `fold` where the output can have no bias, so that v̄ is coded as well.

    What the code loses of v̄ is not averaged out: it weighs as S does for ρ = 1. The code takes S for all of
    it, and v̄ larger by the root of the ratio of its two weights.
    """
    rows = grouping.rows(group)
    mean, weights = moments.value_mean[rows], output_weights(moments, attention, grouping, group)
    heads, width = grouping.query_heads(group), grouping.head_dim
    outputs = attention.o.weight[:, heads.start * width : heads.stop * width].double()
    spread = mean.unflatten(0, (-1, width)).repeat_interleave(grouping.queries, dim=0).flatten()
    ratio = (outputs @ spread).square().sum() / (mean @ weights @ mean).clamp_min(
        torch.finfo(torch.float64).tiny
    )
    second = moments.value_covariance(rows) + ratio * torch.outer(mean, mean)
    return optimal_codes(weights, second).code(rank)


def svd_a(moments: Moments, attention: Attention, grouping: Grouping, group: int, rank: int) -> Code:
    """SVD of the cached values, unweighted and uncentred (SVD-a of arXiv 2406.07056, eqs. 7-14)."""
    rows = grouping.rows(group)
    return subspace_code(moments.value_second[rows, rows], rank)


def svd_w(moments: Moments, attention: Attention, grouping: Grouping, group: int, rank: int) -> Code:
    """SVD of the group's concatenated W_V, without data (the baseline SVD-w of arXiv 2406.07056)."""
    return weight_subspace(attention.v.weight[grouping.rows(group)], rank)


def mean_pool(moments: Moments, attention: Attention, grouping: Grouping, group: int, rank: int) -> Code:
    """Mean of the group's value heads (arXiv 2305.13245)."""
    return mean_code(grouping)
