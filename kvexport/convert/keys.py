"""Codes for keys, one function a method; each takes a layer's moments and weights and codes one group.

Knows what a key is for: a dot product with rotated queries, under a softmax that ignores constants. Must not
know how a code is put into a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvexport.calibrate import Moments, Rotations
from kvexport.convert.codes import Code, Codes, optimal_codes, subspace_code
from kvexport.convert.folding import Folding, mix_energies
from kvexport.convert.groups import Grouping
from kvexport.model.decoder import Attention


def query_weights(moments: Moments, grouping: Grouping, group: int) -> Tensor:
    """S of a group's stacked keys, [n, n] block diagonal: Σ_q gain_q E[q qᵀ] over the heads of each member.

    The gain turns logit error into error of the attention output, so that heads which hardly answer to their
    logits get little of the code.
    """
    n = grouping.size * grouping.head_dim
    weights = torch.zeros(n, n, dtype=torch.float64)
    for head in grouping.query_heads(group):
        block = grouping.member(head)
        weights[block, block] += moments.key_gain[head] * moments.query_second[head]
    return weights


def online_codes(moments: Moments, grouping: Grouping, group: int) -> Codes:
    """Query-weighted, centred codes of the keys as the dot product meets them, after rotation.

    Σ (q·δ)² over all pairs is tr(QᵀQ ΔᵀΔ), so S = E[q qᵀ] is exact for equally weighted pairs; the mean of the
    keys shifts all logits of a row alike, which softmax ignores, so the covariance is centred.
    """
    return optimal_codes(
        query_weights(moments, grouping, group), moments.key_covariance(grouping.rows(group))
    )


def online(moments: Moments, attention: Attention, grouping: Grouping, group: int, rank: int) -> Code:
    return online_codes(moments, grouping, group).code(rank)


def folding(
    moments: Moments, grouping: Grouping, group: int, frequencies: Tensor | None, distances: Rotations
) -> Folding:
    """What codes a group's keys before rotation; the cached pairs turn with `frequencies` [rank/2], None: each of a head once."""
    if frequencies is None:
        frequencies = torch.arange(grouping.head_dim // 2)
    rows = grouping.rows(group)
    return Folding(
        member_weights(moments, grouping, group), moments.key_second[rows, rows], frequencies, distances
    )


def group_energies(moments: Moments, grouping: Grouping, group: int) -> Tensor:
    """The group's `mix_energies`, [d/2, t]."""
    rows = grouping.rows(group)
    return mix_energies(member_weights(moments, grouping, group), moments.key_second[rows, rows])


def cached_frequencies(moments: Moments, grouping: Grouping, rank: int) -> Tensor | None:
    """Which frequency each cached pair of a wide head turns with, ascending [rank/2], alike for all groups of a layer.

    As many pairs of a frequency as its mixes of heads are among the most energetic, weighted by the queries. None for
    heads as wide as trained ones, which take each frequency once, as every runtime does.
    """
    if rank == grouping.head_dim:
        return None
    energies = torch.stack(
        [group_energies(moments, grouping, group) for group in range(grouping.kv_heads)]
    ).sum(0)
    return (
        (energies.flatten().argsort(descending=True, stable=True)[: rank // 2] // grouping.size).sort().values
    )


def member_weights(moments: Moments, grouping: Grouping, group: int) -> Tensor:
    """The blocks of `query_weights`, one for each member of the group: [t, d, d]."""
    weights = query_weights(moments, grouping, group).view(
        grouping.size, grouping.head_dim, grouping.size, grouping.head_dim
    )
    return weights.diagonal(dim1=0, dim2=2).movedim(-1, 0)


def svd_a(moments: Moments, attention: Attention, grouping: Grouping, group: int, rank: int) -> Code:
    """The paper's SVD of the cached keys, unweighted and uncentred (arXiv 2406.07056, eqs. 7-14, 17-18)."""
    rows = grouping.rows(group)
    return subspace_code(moments.key_second[rows, rows], rank)


def svd_w(moments: Moments, attention: Attention, grouping: Grouping, group: int, rank: int) -> Code:
    """SVD of the group's concatenated W_K; no data (the paper's baseline)."""
    return weight_subspace(attention.k.weight[grouping.rows(group)], rank)


def mean_pool(moments: Moments, attention: Attention, grouping: Grouping, group: int, rank: int) -> Code:
    """The mean of the group's heads, which every member's queries then use (arXiv 2305.13245)."""
    return mean_code(grouping)


def mean_code(grouping: Grouping) -> Code:
    each = torch.eye(grouping.head_dim, dtype=torch.float64).repeat(grouping.size, 1)
    return Code(each / grouping.size, each)


def weight_subspace(weight: Tensor, rank: int) -> Code:
    """The leading left singular vectors of a weight [n, hidden]."""
    wide = weight.double()
    return subspace_code(wide @ wide.T, rank)
