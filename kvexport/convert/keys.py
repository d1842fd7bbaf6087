"""Codes of keys: one function per method, each of which codes one group from the layer's moments and weights.

A key is used in dot products with queries, under a softmax. Codes after RoPE (`online`, `svd_a`, `svd_w`) are
made here; those before RoPE come from `kvexport.convert.folding`. For equally weighted pairs of queries q and
keys k of the stack, the squared error of logits is E(qᵀ(k - k̂))² = tr(S · Cov(k - k̂)) with S = E[q qᵀ],
block diagonal over heads. A constant key error adds the same number to all logits of a row, which softmax
ignores; so the covariance is centred.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvexport.calibrate import Moments, Rotations
from kvexport.convert.codes import Code, Codes, optimal_codes, subspace_code
from kvexport.convert.folding import Folding, mix_covariances, mix_energies
from kvexport.convert.groups import Grouping
from kvexport.model.decoder import Attention


def query_weights(moments: Moments, grouping: Grouping, group: int) -> Tensor:
    """S of a group's stacked keys, [t·d, t·d] float64, block diagonal: block h is Σ_q gain_q E[q qᵀ] over its
    queries.

    gain_q (`Moments.key_gain`) converts squared logit error into squared error of the attention output. A
    head whose output hardly depends on its logits so gets little of the code.
    """
    n = grouping.size * grouping.head_dim
    weights = torch.zeros(n, n, dtype=torch.float64)
    for head in grouping.query_heads(group):
        block = grouping.member(head)
        weights[block, block] += moments.key_gain[head] * moments.query_second[head]
    return weights


def online_codes(moments: Moments, grouping: Grouping, group: int) -> Codes:
    """Optimal codes of centred keys after RoPE for S = `query_weights`, all ranks."""
    return optimal_codes(
        query_weights(moments, grouping, group), moments.key_covariance(grouping.rows(group))
    )


def online(moments: Moments, attention: Attention, grouping: Grouping, group: int, rank: int) -> Code:
    """Key code of the method `online`: the one of `online_codes` at this rank."""
    return online_codes(moments, grouping, group).code(rank)


def folding(
    moments: Moments, grouping: Grouping, group: int, frequencies: Tensor | None, distances: Rotations
) -> Folding:
    """The optimisation problem of a group's keys before RoPE, for the method `fold`.

    Args:
        moments: moments before RoPE, keys uncentred.
        frequencies: index of the RoPE frequency of each cached pair, [rank/2] int64; None: each frequency of
            a trained head once.
        distances: rotations between a key and the queries that see it.
    """
    if frequencies is None:
        frequencies = torch.arange(grouping.head_dim // 2)
    rows = grouping.rows(group)
    return Folding(
        member_weights(moments, grouping, group), moments.key_second[rows, rows], frequencies, distances
    )


def group_energies(moments: Moments, grouping: Grouping, group: int) -> Tensor:
    """`mix_energies` of the group, [d/2, t] float64."""
    rows = grouping.rows(group)
    return mix_energies(
        mix_covariances(member_weights(moments, grouping, group), moments.key_second[rows, rows])
    )


def cached_frequencies(moments: Moments, grouping: Grouping, rank: int) -> Tensor | None:
    """Indices of the RoPE frequencies that the cached pairs of a layer rotate with, [rank/2] int64,
    ascending.

    The rank/2 mixes of heads with the most energy, summed over groups, decide how often each frequency
    occurs. None where rank = d: each frequency once, as in a trained head and as every runtime expects.
    """
    if rank == grouping.head_dim:
        return None
    energies = torch.stack(
        [group_energies(moments, grouping, group) for group in range(grouping.kv_heads)]
    ).sum(0)
    return frequencies_with_most(energies, rank)


def frequencies_with_most(energies: Tensor, rank: int) -> Tensor:
    """RoPE frequencies of the rank/2 mixes with the most energy, [..., rank/2] int64, ascending.

    Where rank = d: each frequency once.

    Args:
        energies: `mix_energies`, [..., d/2, t].
        rank: cached numbers, even.
    """
    half, size = energies.shape[-2:]
    if rank == 2 * half:
        return torch.arange(half).expand(*energies.shape[:-2], -1)
    most = energies.flatten(-2).argsort(descending=True, stable=True)[..., : rank // 2]
    return (most // size).sort().values


def member_weights(moments: Moments, grouping: Grouping, group: int) -> Tensor:
    """The diagonal blocks of `query_weights`, one per trained KV head of the group: [t, d, d] float64."""
    weights = query_weights(moments, grouping, group).view(
        grouping.size, grouping.head_dim, grouping.size, grouping.head_dim
    )
    return weights.diagonal(dim1=0, dim2=2).movedim(-1, 0)


def svd_a(moments: Moments, attention: Attention, grouping: Grouping, group: int, rank: int) -> Code:
    """SVD of the cached keys, unweighted and uncentred (SVD-a of arXiv 2406.07056, eqs. 7-14; after RoPE,
    17-18).
    """
    rows = grouping.rows(group)
    return subspace_code(moments.key_second[rows, rows], rank)


def svd_w(moments: Moments, attention: Attention, grouping: Grouping, group: int, rank: int) -> Code:
    """SVD of the group's concatenated W_K, without data (the baseline SVD-w of arXiv 2406.07056)."""
    return weight_subspace(attention.k.weight[grouping.rows(group)], rank)


def mean_pool(moments: Moments, attention: Attention, grouping: Grouping, group: int, rank: int) -> Code:
    """Mean of the group's key heads, which the queries of all of them use (arXiv 2305.13245)."""
    return mean_code(grouping)


def mean_code(grouping: Grouping) -> Code:
    """The code whose cached head is the mean of the group's heads."""
    each = torch.eye(grouping.head_dim, dtype=torch.float64).repeat(grouping.size, 1)
    return Code(each / grouping.size, each)


def weight_subspace(weight: Tensor, rank: int) -> Code:
    """The code of the `rank` leading left singular vectors of a weight [n, hidden]."""
    wide = weight.double()
    return subspace_code(wide @ wide.T, rank)
