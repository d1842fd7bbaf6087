"""Moments of keys and queries after RoPE, averaged over all positions of the deployed context.

A key or query before RoPE hardly depends on its position. So moments after RoPE, averaged over any range of
positions or distances, follow in closed form from those before RoPE. A code made for the positions of the
calibration windows alone fails beyond them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvexport.calibrate.moments import Moments
from kvexport.model.decoder import Rope


def average_over_positions(moments: Moments, rope: Rope, positions: int) -> Moments:
    """Convert moments before RoPE to moments after RoPE, positions 0 .. positions - 1 with equal weight."""
    average = Rotations(rope, positions)
    return replace(
        moments,
        key_mean=average.mean(moments.key_mean),
        key_second=average.second(moments.key_second),
        query_second=torch.stack([average.second(each) for each in moments.query_second]),
    )


def uncentre_keys(moments: Moments) -> Moments:
    """Set the mean key to zero, so that covariances of keys become second moments: for codes before RoPE.

    The mean key's part of a logit changes with the distance, so it is not a constant of a row that softmax
    ignores.
    """
    return replace(moments, key_mean=torch.zeros_like(moments.key_mean))


class Rotations:
    """Averages of R_n x and R_n x yᵀ R_nᵀ over positions n, for stacks x and y of heads.

    As a complex number z_i, pair i of a head is multiplied by m_i e^{j n θ_i} under R_n, where m is the
    magnitude of RoPE. So E[z_i z̄_k] is multiplied by m_i m_k and the average of e^{j n (θ_i - θ_k)}, and
    E[z_i z_k] by that of e^{j n (θ_i + θ_k)}; both together give the real moments.
    """

    def __init__(self, rope: Rope, positions: int) -> None:
        """Average over n = 0 .. positions - 1 with equal weight."""
        angles = (
            torch.arange(positions, dtype=torch.float64)[:, None] * rope.inv_freq.double()
        )  # [positions, d/2]
        self._set(angles, torch.full((positions,), 1 / positions, dtype=torch.float64), rope.magnitude)

    @classmethod
    def by_distance(cls, rope: Rope, distances: int) -> Rotations:
        """Average over R_{-n}, n = 0 .. distances - 1, as a query n tokens later sees a key, with weights
        1/(n + 1).

        Every octave of distances has the same weight, so that both near and far keys count. The magnitude is
        squared, as both the query and the key have it.
        """
        average, n = cls.__new__(cls), torch.arange(distances, dtype=torch.float64)
        weights = 1 / (n + 1)
        squared = None if rope.magnitude is None else rope.magnitude.double().square()
        average._set(-n[:, None] * rope.inv_freq.double(), weights / weights.sum(), squared)
        return average

    def _set(self, angles: Tensor, weights: Tensor, magnitude: Tensor | None) -> None:
        lengths = torch.ones_like(angles) if magnitude is None else magnitude.double().expand_as(angles)
        phases = torch.polar(lengths.contiguous(), angles)
        weighted = (weights[:, None] * phases).T
        self._mean = weighted.sum(1)  # [d/2]
        self._difference = weighted @ phases.conj()  # [d/2, d/2]
        self._sum = weighted @ phases

    def mean(self, x: Tensor) -> Tensor:
        """Average of R_n x for a stack x [h·d]."""
        pairs = x.view(-1, 2, len(self._mean))
        rotated = torch.complex(pairs[:, 0], pairs[:, 1]) * self._mean
        return torch.stack((rotated.real, rotated.imag), 1).flatten()

    def second(
        self, xy: Tensor, rows: Tensor | None = None, columns: Tensor | None = None, inverse: bool = False
    ) -> Tensor:
        """Average of R_n x yᵀ R_nᵀ for stacks x [g·2p] and y [h·2q].

        Args:
            xy: x yᵀ, or its expectation, [g·2p, h·2q].
            rows: index of the RoPE frequency of each pair of x, [p] int64; None: those of a trained head, p =
                d/2.
            columns: the same for y, [q] int64.
            inverse: average R_{-n} x yᵀ R_{-n}ᵀ instead.
        """
        half = len(self._mean)
        by_row, by_column = (slice(None) if each is None else each for each in (rows, columns))
        difference, total = (each[by_row][:, by_column] for each in (self._difference, self._sum))
        if inverse:
            difference, total = difference.conj(), total.conj()
        p, q = (half if each is None else len(each) for each in (rows, columns))
        blocks = xy.reshape(xy.shape[0] // (2 * p), 2, p, xy.shape[1] // (2 * q), 2, q)
        first, cross, transposed, second = (
            blocks[:, 0, :, :, 0],
            blocks[:, 0, :, :, 1],
            blocks[:, 1, :, :, 0],
            blocks[:, 1, :, :, 1],
        )
        hermitian = torch.complex(first + second, transposed - cross) * difference[:, None]  # E[z z̄]
        plain = torch.complex(first - second, transposed + cross) * total[:, None]  # E[z z]
        mean, rest = (hermitian + plain) / 2, (hermitian - plain) / 2
        average = torch.stack(
            (torch.stack((mean.real, -rest.imag), 3), torch.stack((mean.imag, rest.real), 3)), 1
        )
        return average.reshape(xy.shape)
