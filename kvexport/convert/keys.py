"""Codes for keys, one function a method; each takes a layer's moments and weights and codes one group.

Knows what a key is for: a dot product with rotated queries, under a softmax that ignores constants. Must not
know how a code is put into a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvexport.calibrate import Moments
from kvexport.convert.codes import Code, Codes, leading_eigenvectors, optimal_codes, subspace_code
from kvexport.convert.groups import Grouping
from kvexport.decoder import Attention


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
    return optimal_codes(query_weights(moments, grouping, group), moments.key_covariance(grouping.rows(group)))


def online(moments: Moments, attention: Attention, grouping: Grouping, group: int, rank: int) -> Code:
    return online_codes(moments, grouping, group).code(rank)


def fold(moments: Moments, attention: Attention, grouping: Grouping, group: int, rank: int) -> Code:
    """The best code that commutes with RoPE, so that it folds into W_Q and W_K; `rank` is head_dim.

    Rotation multiplies the complex number z_h = k[i] + j k[i + d/2] of every head by one phase, so a complex mix
    across heads at one frequency i commutes with it: a Hermitian eigenproblem of size t for each frequency,
    weighted by the power of the queries there, gives cached channel i. Written out in real numbers, E and U have
    2x2 rotation-and-scale blocks.
    """
    assert rank == grouping.head_dim
    share, weighted = _by_frequency(moments, grouping, group)
    b = share.clamp_min(1e-12).sqrt()  # a head that nobody asks still has a code
    leading = leading_eigenvectors(weighted, 1)[:, :, 0]
    into, out = b * leading, leading / b  # c = Σ conj(e_h) z_h, ẑ_h = u_h c
    norm = out.abs().square().sum(1, keepdim=True).sqrt()
    return Code(_real(into * norm), _real(out / norm))


def fold_spectrum(moments: Moments, grouping: Grouping, group: int) -> Tensor:
    """Weighted energy of the group's keys in each complex mix of its heads, [d/2, t], ascending; `fold` keeps the last.

    A logit error through the pair z - ẑ has the variance E|w|² E|z - ẑ|² / 2.
    """
    _, weighted = _by_frequency(moments, grouping, group, absolute=True)
    return torch.linalg.eigvalsh(weighted) / 2


def _by_frequency(moments: Moments, grouping: Grouping, group: int, absolute: bool = False) -> tuple[Tensor, Tensor]:
    """Query power of each head [d/2, t], as a share of the largest unless `absolute`, and the E[z zᴴ] that it weights."""
    size, half = grouping.size, grouping.head_dim // 2
    covariance = moments.key_covariance(grouping.rows(group)).view(size, 2, half, size, 2, half)
    pairs = covariance.diagonal(dim1=2, dim2=5).movedim(-1, 0)  # [d/2, t, 2, t, 2], of one frequency each
    hermitian = torch.complex(
        pairs[:, :, 0, :, 0] + pairs[:, :, 1, :, 1], pairs[:, :, 1, :, 0] - pairs[:, :, 0, :, 1]
    )  # E[z zᴴ], [d/2, t, t]
    power = query_weights(moments, grouping, group).diagonal().view(size, 2, half).sum(1).T  # [d/2, t]
    if not absolute:
        power = power / power.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    b = power.clamp_min(0 if absolute else 1e-12).sqrt()
    return power, b[:, :, None] * hermitian * b[:, None, :]


def _real(mix: Tensor) -> Tensor:
    """Complex multiplication by mix [d/2, t], a 2x2 real block for each frequency and head: [t·d, d]."""
    real, imaginary = mix.real.T, mix.imag.T
    blocks = torch.stack((real, -imaginary, imaginary, real), dim=1).unflatten(1, (2, 2))  # [t, 2, 2, d/2]
    return torch.diag_embed(blocks).transpose(2, 3).flatten(0, 2).flatten(1)  # [t, 2, d/2, 2, d/2] -> [t·d, d]


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
