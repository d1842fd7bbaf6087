"""Codes of keys before RoPE, which fold into W_Q and W_K and hold at every distance between query and key.

The layer caches c = Eᵀ k of the group's stacked unrotated keys k [t·d]. c consists of P pairs, each of which
rotates with the RoPE frequency assigned to it; a query q of head h becomes D_h q [2P]. Let R_n rotate a
trained head by n positions, C_n the cached pairs. A key n tokens back should give the logit qᵀ R_{-n} k_h and
gives (D_h q)ᵀ C_{-n} c. The loss

    Σ_h E_n tr(S_h (R_{-n} P_h - D_hᵀ C_{-n} Eᵀ) K (R_{-n} P_h - D_hᵀ C_{-n} Eᵀ)ᵀ),

with S_h the weighted E[q qᵀ] of head h, K = E[k kᵀ] and P_h the rows of head h, depends on the distance n
alone. It is quadratic in D and in E, and each has a closed form given the other:

    D_h = E_n[C_{-n} Eᵀ K E C_n]⁻¹ E_n[C_{-n} Eᵀ K P_hᵀ R_n]
    Eᵀ  = (Σ_h E_n[C_n D_h S_h D_hᵀ C_{-n}])⁻¹ Σ_h E_n[C_n D_h S_h R_{-n}] P_h

`Folding.code` alternates between the two. It starts from the codes that commute with rotation: for each
frequency one complex mix of the group's heads, which is optimal if phases are uniformly distributed. Those
codes include the rotations of arXiv 2412.20677, which align heads before they are averaged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvexport.calibrate.positions import Rotations
from kvexport.convert.codes import Code

ROUNDS = 32  # alternations between D and E
_RIDGE = 1e-6  # of the mean diagonal


class Folding:
    """The optimisation problem of one group of t heads in P cached pairs."""

    def __init__(self, weights: Tensor, second: Tensor, frequencies: Tensor, distances: Rotations) -> None:
        """
        Args:
            weights: S_h of each head before RoPE, [t, d, d] float64.
            second: K = E[k kᵀ] of the group's stacked keys before RoPE, [t·d, t·d] float64.
            frequencies: index of each cached pair's RoPE frequency, [P] int64, ascending.
            distances: averages over the rotations between a key and the queries that see it.
        """
        self._each, self._weights, self._second = weights, torch.block_diag(*weights), second
        self._frequencies, self._distances = frequencies, distances

    def code(self, rounds: int = ROUNDS) -> Code:
        """Minimise the loss by alternation; the result is scaled so that all cached pairs have the same norm
        in D.

        Args:
            rounds: number of alternations.

        Returns:
            A code with E and U = Dᵀ, each [t·d, 2P].
        """
        encode = self.start()
        decode = self.best_decoder(encode)
        for _ in range(rounds):
            encode = self.best_encoder(decode)
            decode = self.best_decoder(encode)
        norm = decode.view(2, -1, decode.shape[1]).square().sum(2).mean(0).sqrt()
        norm = torch.where(norm > 0, norm, torch.ones_like(norm)).repeat(2)[:, None]
        return Code(encode * norm.T, (decode / norm).T)

    @property
    def power(self) -> float:
        """Weighted power of the logits: the loss without any code."""
        return float((self._weights * self._distances.second(self._second)).sum())  # S is block diagonal

    def loss(self, code: Code) -> float:
        """Weighted power of the logit error of a code."""
        encode, decode = code.encode, code.decode.T
        weighted = decode @ self._weights
        crossed = (weighted * self._distances.second(encode.T @ self._second, self._frequencies)).sum()
        return self.power - float(2 * crossed - ((weighted @ decode.T) * self._cached(encode)).sum())

    def _cached(self, encode: Tensor) -> Tensor:
        """E_n[C_{-n} c cᵀ C_n], [2P, 2P]."""
        return self._distances.second(encode.T @ self._second @ encode, self._frequencies, self._frequencies)

    def best_decoder(self, encode: Tensor) -> Tensor:
        """The optimal D of all heads side by side, [2P, t·d], for E [t·d, 2P]."""
        crossed = self._distances.second(encode.T @ self._second, self._frequencies)
        return _solve(self._cached(encode), crossed)

    def best_encoder(self, decode: Tensor) -> Tensor:
        """The optimal E [t·d, 2P] for D [2P, t·d]."""
        weighted = decode @ self._weights
        normal = self._distances.second(
            weighted @ decode.T, self._frequencies, self._frequencies, inverse=True
        )
        return _solve(normal, self._distances.second(weighted, self._frequencies, inverse=True)).T

    def start(self) -> Tensor:
        """E of the optimal complex mixes of heads for uniformly distributed phases, [t·d, 2P]."""
        size, half, pairs = len(self._each), self._each.shape[1] // 2, len(self._frequencies)
        roots, weighted = _by_frequency(self._each, self._second)
        vectors = torch.linalg.eigh(weighted).eigenvectors.flip(-1)
        # index of each pair among those of its frequency: 0, 1, ...
        place = torch.arange(pairs) - torch.searchsorted(self._frequencies, self._frequencies)
        mixes = roots[self._frequencies] * vectors[self._frequencies, :, place]  # [P, t]
        encode, at = torch.zeros(size, 2, half, 2, pairs, dtype=torch.float64), torch.arange(pairs)
        encode[:, 0, self._frequencies, 0, at] = encode[:, 1, self._frequencies, 1, at] = mixes.real.T
        encode[:, 0, self._frequencies, 1, at] = -mixes.imag.T
        encode[:, 1, self._frequencies, 0, at] = mixes.imag.T
        return encode.reshape(size * 2 * half, 2 * pairs)


def mix_energies(weights: Tensor, second: Tensor) -> Tensor:
    """Logit power of each orthogonal complex mix of a group's heads, for uniformly distributed phases.

    At frequency i let z be the pairs of the group's keys as complex numbers, w those of its queries, and b =
    diag(E|w|²)^½. The energies are half the eigenvalues of b E[z zᴴ] b; a mix that is left out adds its
    energy to the squared logit error. They do not change when all keys or all queries are rotated alike.

    Args:
        weights: S_h of each head, as `Folding` takes it.
        second: E[k kᵀ] of the group, as `Folding` takes it.

    Returns:
        [d/2, t] float64, descending along the last axis.
    """
    return torch.linalg.eigvalsh(_by_frequency(weights, second)[1]).flip(-1).clamp_min(0) / 2


def _by_frequency(weights: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """b, the root of each head's query power [d/2, t], and b E[z zᴴ] b at each frequency [d/2, t, t]."""
    size, half = len(weights), weights.shape[1] // 2
    # [d/2, t, 2, t, 2]
    pairs = second.view(size, 2, half, size, 2, half).diagonal(dim1=2, dim2=5).movedim(-1, 0)
    hermitian = torch.complex(
        pairs[:, :, 0, :, 0] + pairs[:, :, 1, :, 1], pairs[:, :, 1, :, 0] - pairs[:, :, 0, :, 1]
    )
    power = weights.diagonal(dim1=1, dim2=2).view(size, 2, half).sum(1).T
    # a head without query power still gets a code
    least = torch.where(power.max() > 0, power.max() * 1e-12, torch.ones(()))
    b = power.clamp_min(least).sqrt()
    return b, b[:, :, None] * hermitian * b[:, None, :]


def _solve(normal: Tensor, target: Tensor) -> Tensor:
    """Solve normal · x = target by ridge regression; 0 where `normal` is 0 (keys that are all zero)."""
    scale = normal.diagonal().mean()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.linalg.solve(normal + _RIDGE * scale * torch.eye(len(normal), dtype=normal.dtype), target)
