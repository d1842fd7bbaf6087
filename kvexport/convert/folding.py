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

`Folding.code` alternates between the two, and extrapolates the steps of E. It starts from the codes that
commute with rotation: for each frequency one complex mix of the group's heads, which is optimal if phases are
uniformly distributed. Those codes include the rotations of arXiv 2412.20677, which align heads before they
are averaged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvexport.calibrate.positions import Rotations
from kvexport.convert.codes import Code

ROUNDS = 16  # alternations between D and E
# share of the last step of E that is added to it; halves the alternations, but above 1 the loss can increase
_EXTRAPOLATION = 0.7
_RIDGE = 1e-6  # of the mean diagonal


class Folding:
    """The optimisation problem of one group of t heads in P cached pairs, or those of several groups at once:
    `...` below are leading dimensions.
    """

    def __init__(self, weights: Tensor, second: Tensor, frequencies: Tensor, distances: Rotations) -> None:
        """
        Args:
            weights: S_h of each head before RoPE, [..., t, d, d] float64.
            second: K = E[k kᵀ] of the group's stacked keys before RoPE, [..., t·d, t·d] float64.
            frequencies: index of each cached pair's RoPE frequency, [..., P] int64, ascending.
            distances: averages over the rotations between a key and the queries that see it.
        """
        self._weights, self._second, self._distances = weights, second, distances
        self._frequencies = frequencies.expand(*second.shape[:-2], -1).contiguous()
        self._crossed = distances.of_pairs(frequencies)
        self._cached = distances.of_pairs(frequencies, frequencies)
        self._crossed_back = distances.of_pairs(frequencies, inverse=True)
        self._cached_back = distances.of_pairs(frequencies, frequencies, inverse=True)

    def code(self, rounds: int = ROUNDS) -> Code:
        """Minimise the loss by alternation with extrapolation; the result is scaled so that all cached pairs
        have the same norm in D.

        Args:
            rounds: number of alternations, at least 1.

        Returns:
            A code with E and U = Dᵀ, each [..., t·d, 2P].
        """
        encode = previous = self.best_encoder(self.best_decoder(self.start()))
        for _ in range(rounds - 1):
            optimal = self.best_encoder(self.best_decoder(encode))
            encode, previous = optimal + _EXTRAPOLATION * (optimal - previous), optimal
        decode = self.best_decoder(encode)
        norm = decode.unflatten(-2, (2, -1)).square().sum(-1).mean(-2).sqrt()  # [..., P]
        norm = torch.where(norm > 0, norm, torch.ones_like(norm))
        norm = torch.cat((norm, norm), -1)[..., None, :]
        return Code(encode * norm, decode.mT / norm)

    @property
    def power(self) -> Tensor:
        """Weighted power of the logits: the loss without any code, [...]."""
        heads = self._weights.shape[-3:-1]
        own = self._second.unflatten(-1, heads).unflatten(-3, heads).diagonal(dim1=-4, dim2=-2)
        return (self._weights * self._distances.second(own.movedim(-1, -3))).sum((-3, -2, -1))

    def loss(self, code: Code) -> Tensor:
        """Weighted power of the logit error of a code, [...]."""
        decode, coded = code.decode.mT, code.encode.mT @ self._second
        weighted = self._weigh(decode)
        crossed = (weighted * self._crossed(coded)).sum((-2, -1))
        kept = ((weighted @ decode.mT) * self._cached(coded @ code.encode)).sum((-2, -1))
        return self.power - (2 * crossed - kept)

    def best_decoder(self, encode: Tensor) -> Tensor:
        """The optimal D of all heads side by side, [..., 2P, t·d], for E [..., t·d, 2P]."""
        coded = encode.mT @ self._second
        return _solve(self._cached(coded @ encode), self._crossed(coded))

    def best_encoder(self, decode: Tensor) -> Tensor:
        """The optimal E [..., t·d, 2P] for D [..., 2P, t·d]."""
        weighted = self._weigh(decode)
        return _solve(self._cached_back(weighted @ decode.mT), self._crossed_back(weighted)).mT

    def start(self) -> Tensor:
        """E of the optimal complex mixes of heads for uniformly distributed phases, [..., t·d, 2P]."""
        frequencies, size, half = self._frequencies, self._weights.shape[-3], self._weights.shape[-1] // 2
        roots, weighted = _by_frequency(self._weights, self._second)
        mixes = (
            roots[..., None, :] * torch.linalg.eigh(weighted).eigenvectors.flip(-1).mT
        )  # [..., d/2, mix, t]
        # index of each pair among those of its frequency: 0, 1, ...
        place = torch.arange(frequencies.shape[-1]) - torch.searchsorted(frequencies, frequencies)
        chosen = (frequencies * size + place)[..., None].expand(*frequencies.shape, size)
        mixes = mixes.flatten(-3, -2).gather(-2, chosen).mT[..., None, :]  # [..., t, 1, P]
        assigned = torch.arange(half)[:, None] == frequencies[..., None, None, :]  # [..., 1, d/2, P]
        real, imag = mixes.real * assigned, mixes.imag * assigned
        return torch.stack((torch.cat((real, -imag), -1), torch.cat((imag, real), -1)), -3).flatten(-4, -2)

    def _weigh(self, decode: Tensor) -> Tensor:
        """D S [..., 2P, t·d], where S is block diagonal, for D of the same shape."""
        by_head = decode.unflatten(-1, self._weights.shape[-3:-1]).movedim(-2, -3)  # [..., t, 2P, d]
        return (by_head @ self._weights).movedim(-3, -2).flatten(-2)


def mix_covariances(weights: Tensor, second: Tensor) -> Tensor:
    """b E[z zᴴ] b at each frequency, complex [..., d/2, t, t], for `mix_energies`; that of some of the heads
    is a block.

    At frequency i, z are the pairs of the group's keys as complex numbers, w those of its queries, and b =
    diag(E|w|²)^½.

    Args:
        weights: S_h of each head, as `Folding` takes it.
        second: E[k kᵀ] of the group, as `Folding` takes it.
    """
    return _by_frequency(weights, second)[1]


def mix_energies(covariances: Tensor) -> Tensor:
    """Logit power of each orthogonal complex mix of a group's heads, for uniformly distributed phases.

    The energies are half the eigenvalues of `mix_covariances`, [..., d/2, t] float64, descending along the
    last axis. A mix that is left out adds its energy to the squared logit error. Energies do not change when
    all keys or all queries are rotated alike.
    """
    return torch.linalg.eigvalsh(covariances).flip(-1).clamp_min(0) / 2


def _by_frequency(weights: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """b, the root of each head's query power [..., d/2, t], and b E[z zᴴ] b at each frequency,
    [..., d/2, t, t].
    """
    parts = weights.shape[-3], 2, weights.shape[-1] // 2
    pairs = second.unflatten(-1, parts).unflatten(-4, parts)  # [..., t, 2, d/2, t, 2, d/2]
    pairs = pairs.diagonal(dim1=-4, dim2=-1).movedim(-1, -5)  # [..., d/2, t, 2, t, 2]
    hermitian = torch.complex(
        pairs[..., 0, :, 0] + pairs[..., 1, :, 1], pairs[..., 1, :, 0] - pairs[..., 0, :, 1]
    )
    power = weights.diagonal(dim1=-2, dim2=-1).unflatten(-1, parts[1:]).sum(-2).mT
    # a head without query power still gets a code
    most = power.amax((-2, -1), keepdim=True)
    b = power.maximum(torch.where(most > 0, most * 1e-12, torch.ones_like(most))).sqrt()
    return b, b[..., :, None] * hermitian * b[..., None, :]


def _solve(normal: Tensor, target: Tensor) -> Tensor:
    """Solve normal · x = target by ridge regression; 0 where `normal` is 0 (keys that are all zero)."""
    scale = normal.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    ridge = torch.diag_embed((_RIDGE * scale).expand(normal.shape[:-1]))
    return torch.linalg.solve(normal + ridge, target)
