"""Codes of rotary keys that are made before rotation, so that they fold into W_Q and W_K and hold at every position.

What is cached is c = Eᵀ k, of the group's stacked unrotated keys, in pairs that rotate with frequencies of their own; a query
of head h is D_h q. With R_n the rotation of trained heads and C_n that of cached pairs, a key n tokens back gives the logit
(D_h q)ᵀ C_{-n} c in place of qᵀ R_{-n} k_h. What that loses,

    Σ_h E_n tr(S_h (R_{-n} P_h - D_hᵀ C_{-n} Eᵀ) E[k kᵀ] (R_{-n} P_h - D_hᵀ C_{-n} Eᵀ)ᵀ),

S_h = E[q qᵀ] and P_h the rows of head h, depends on the distance n alone, not on where both stand. It is quadratic in D and
in E, and each has a closed form for the other given (K = E[k kᵀ]):

    D_h = E_n[C_{-n} Eᵀ K E C_n]⁻¹ E_n[C_{-n} Eᵀ K P_hᵀ R_n]
    Eᵀ  = (Σ_h E_n[C_n D_h S_h D_hᵀ C_{-n}])⁻¹ Σ_h E_n[C_n D_h S_h R_{-n}] P_h

Were all distances alike, D and E would have to commute with rotation: one complex mix of the group's heads a pair, the start.
Knows moments and rotations; must not know how a code is put into a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvexport.calibrate.positions import Rotations
from kvexport.convert.codes import Code

_ROUNDS = 8  # of D and E: 30 gain a few per cent more
_RIDGE = 1e-6  # of the mean diagonal


class Folding:
    """One group of t heads in P cached pairs.

    Args:
        weights: S of each head, [t, d, d], before rotation.
        second: E[k kᵀ] of the group's stacked keys before rotation, [t·d, t·d].
        frequencies: which frequency each cached pair turns with, [P] int64; the pairs of one are adjacent.
        distances: how keys turn before queries see them.
    """

    def __init__(self, weights: Tensor, second: Tensor, frequencies: Tensor, distances: Rotations) -> None:
        self._each, self._weights, self._second = weights, torch.block_diag(*weights), second
        self._frequencies, self._distances = frequencies, distances

    def code(self) -> Code:
        """The best code found, scaled so that every cached pair weighs alike in D."""
        encode = self._start()
        decode = self._decode(encode)
        for _ in range(_ROUNDS):
            encode = self._encode(decode)
            decode = self._decode(encode)
        norm = decode.view(2, -1, decode.shape[1]).square().sum(2).mean(0).sqrt()
        norm = torch.where(norm > 0, norm, torch.ones_like(norm)).repeat(2)[:, None]
        return Code(encode * norm.T, (decode / norm).T)

    @property
    def power(self) -> float:
        """E of the squared logits, weighted as S is: what no code at all loses."""
        return float((self._weights * self._distances.second(self._second)).sum())  # S is block diagonal

    def loss(self, code: Code) -> float:
        """What a code loses: E of the squared error of logits, weighted as S is."""
        encode, decode = code.encode, code.decode.T
        code_moments = decode @ self._weights
        crossed = (code_moments * self._distances.second(encode.T @ self._second, self._frequencies)).sum()
        return self.power - float(2 * crossed - ((code_moments @ decode.T) * self._cached(encode)).sum())

    def _cached(self, encode: Tensor) -> Tensor:
        """E[c cᵀ] as queries see it, [2P, 2P]."""
        return self._distances.second(encode.T @ self._second @ encode, self._frequencies, self._frequencies)

    def _decode(self, encode: Tensor) -> Tensor:
        """The best D of all heads side by side, [2P, t·d], for given E [t·d, 2P]."""
        crossed = self._distances.second(encode.T @ self._second, self._frequencies)
        return _solve(self._cached(encode), crossed)

    def _encode(self, decode: Tensor) -> Tensor:
        """The best E [t·d, 2P] for given D [2P, t·d]."""
        code_moments = decode @ self._weights
        asked = self._distances.second(
            code_moments @ decode.T, self._frequencies, self._frequencies, inverse=True
        )
        return _solve(asked, self._distances.second(code_moments, self._frequencies, inverse=True)).T

    def _start(self) -> Tensor:
        """E of the best complex mixes of heads, phases averaged, [t·d, 2P]."""
        size, half, pairs = len(self._each), self._each.shape[1] // 2, len(self._frequencies)
        roots, weighted = _by_frequency(self._each, self._second)
        vectors = torch.linalg.eigh(weighted).eigenvectors.flip(-1)
        place = torch.arange(pairs) - torch.searchsorted(
            self._frequencies, self._frequencies
        )  # first, second, ... of one
        mixes = roots[self._frequencies] * vectors[self._frequencies, :, place]  # [P, t]
        encode, at = torch.zeros(size, 2, half, 2, pairs, dtype=torch.float64), torch.arange(pairs)
        encode[:, 0, self._frequencies, 0, at] = encode[:, 1, self._frequencies, 1, at] = mixes.real.T
        encode[:, 0, self._frequencies, 1, at] = -mixes.imag.T
        encode[:, 1, self._frequencies, 0, at] = mixes.imag.T
        return encode.reshape(size * 2 * half, 2 * pairs)


def mix_energies(weights: Tensor, second: Tensor) -> Tensor:
    """What each orthogonal complex mix of a group's heads at one frequency puts into logits, phases averaged: [d/2, t], falling.

    A pair left out costs E|w|² E|z|² / 2 a frequency, w the query's (papers' section 6.1 in complex form). Takes what
    `Folding` takes; rotating all keys or all queries alike changes nothing.
    """
    return torch.linalg.eigvalsh(_by_frequency(weights, second)[1]).flip(-1).clamp_min(0) / 2


def _by_frequency(weights: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """b, the root of each head's query power [d/2, t], and b E[z zᴴ] b at each frequency [d/2, t, t]."""
    size, half = len(weights), weights.shape[1] // 2
    pairs = (
        second.view(size, 2, half, size, 2, half).diagonal(dim1=2, dim2=5).movedim(-1, 0)
    )  # [d/2, t, 2, t, 2]
    hermitian = torch.complex(
        pairs[:, :, 0, :, 0] + pairs[:, :, 1, :, 1], pairs[:, :, 1, :, 0] - pairs[:, :, 0, :, 1]
    )
    power = weights.diagonal(dim1=1, dim2=2).view(size, 2, half).sum(1).T
    least = torch.where(
        power.max() > 0, power.max() * 1e-12, torch.ones(())
    )  # a head that nobody asks still has a code
    b = power.clamp_min(least).sqrt()
    return b, b[:, :, None] * hermitian * b[:, None, :]


def _solve(normal: Tensor, wanted: Tensor) -> Tensor:
    scale = normal.diagonal().mean()
    scale = torch.where(
        scale > 0, scale, torch.ones_like(scale)
    )  # of keys that are all zero nothing is wanted
    return torch.linalg.solve(normal + _RIDGE * scale * torch.eye(len(normal), dtype=normal.dtype), wanted)
