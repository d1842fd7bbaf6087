"""Codes for keys, one function a method; each takes a layer's moments and weights and codes one group.

Knows what a key is for: a dot product with rotated queries, under a softmax that ignores constants. Must not
know how a code is put into a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvexport.calibrate import Moments
from kvexport.convert.codes import Code, leading_eigenvectors, optimal_code, subspace_code
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


def online(moments: Moments, attention: Attention, grouping: Grouping, group: int) -> Code:
    """Query-weighted, centred code of the keys as the dot product meets them, after rotation.

    Σ (q·δ)² over all pairs is tr(QᵀQ ΔᵀΔ), so S = E[q qᵀ] is exact for equally weighted pairs; the mean of the
    keys shifts all logits of a row alike, which softmax ignores, so the covariance is centred.
    """
    rows = grouping.rows(group)
    return optimal_code(query_weights(moments, grouping, group), moments.key_covariance[rows, rows], grouping.head_dim)


def fold(moments: Moments, attention: Attention, grouping: Grouping, group: int) -> Code:
    """The best code that commutes with RoPE, so that it folds into W_Q and W_K.

    Rotation multiplies the complex number z_h = k[i] + j k[i + d/2] of every head by one phase, so a complex mix
    across heads at one frequency i commutes with it: a Hermitian eigenproblem of size t for each frequency,
    weighted by the power of the queries there, gives cached channel i. Written out in real numbers, E and U have
    2x2 rotation-and-scale blocks.
    """
    size, width = grouping.size, grouping.head_dim
    half, rows = width // 2, grouping.rows(group)
    blocks = moments.key_covariance[rows, rows].view(size, 2, half, size, 2, half)
    power = query_weights(moments, grouping, group).diagonal().view(size, 2, half).sum(1)  # [t, d/2]
    encode = torch.zeros(size, 2, half, 2, half, dtype=torch.float64)
    decode = torch.zeros_like(encode)
    for i in range(half):
        pair = blocks[:, :, i, :, :, i]  # [t, 2, t, 2]
        hermitian = torch.complex(pair[:, 0, :, 0] + pair[:, 1, :, 1], pair[:, 1, :, 0] - pair[:, 0, :, 1])  # E[z z^H]
        b = power[:, i].clamp_min(power[:, i].max() * 1e-12 + 1e-300).sqrt().to(torch.complex128)
        leading = leading_eigenvectors(b[:, None] * hermitian * b, 1)[:, 0]
        into, out = b * leading, leading / b
        norm = into.abs().square().sum().sqrt()
        # c = Σ conj(e_h) z_h and ẑ_h = u_h c.
        _put(encode, i, into / norm)
        _put(decode, i, out * norm)
    return Code(encode.view(-1, width), decode.view(-1, width))


def _put(real: Tensor, i: int, mix: Tensor) -> None:
    """Write complex multiplication by mix_h [t] as 2x2 real blocks at frequency i of [t, 2, d/2, 2, d/2]."""
    real[:, 0, i, 0, i] = mix.real
    real[:, 1, i, 1, i] = mix.real
    real[:, 1, i, 0, i] = mix.imag
    real[:, 0, i, 1, i] = -mix.imag


def svd_a(moments: Moments, attention: Attention, grouping: Grouping, group: int) -> Code:
    """The paper's SVD of the cached keys, unweighted and uncentred (arXiv 2406.07056, eqs. 7-14, 17-18)."""
    rows = grouping.rows(group)
    return subspace_code(moments.key_second[rows, rows], grouping.head_dim)


def svd_w(moments: Moments, attention: Attention, grouping: Grouping, group: int) -> Code:
    """SVD of the group's concatenated W_K; no data (the paper's baseline)."""
    return weight_subspace(attention.k.weight[grouping.rows(group)], grouping.head_dim)


def mean_pool(moments: Moments, attention: Attention, grouping: Grouping, group: int) -> Code:
    """The mean of the group's heads, which every member's queries then use (arXiv 2305.13245)."""
    return mean_code(grouping)


def mean_code(grouping: Grouping) -> Code:
    each = torch.eye(grouping.head_dim, dtype=torch.float64).repeat(grouping.size, 1)
    return Code(each / grouping.size, each)


def weight_subspace(weight: Tensor, rank: int) -> Code:
    """The leading left singular vectors of a weight [n, hidden]."""
    wide = weight.double()
    return subspace_code(wide @ wide.T, rank)
