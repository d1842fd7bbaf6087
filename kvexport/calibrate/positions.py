"""Moments of keys and queries as they meet in the dot product, over all positions of the deployed context.

What a token's key and query are before rotation hardly depends on where it stands, so their moments after rotation,
averaged over any range of positions or distances, follow from those before it in closed form. A code made for the positions
of the calibration windows alone fails beyond them. Knows RoPE; must not know what the moments are for.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvexport.calibrate.moments import Moments
from kvexport.model.decoder import Rope


def over_positions(moments: Moments, rope: Rope, positions: int) -> Moments:
    """Unrotated moments as rotated ones, at positions 0 .. positions - 1 with equal weight."""
    average = Rotations(rope, positions)
    return replace(
        moments,
        key_mean=average.mean(moments.key_mean),
        key_second=average.second(moments.key_second),
        query_second=torch.stack([average.second(each) for each in moments.query_second]),
    )


def unrotated(moments: Moments) -> Moments:
    """Unrotated moments for codes of keys before rotation: with keys uncentred.

    The mean key's share of a logit turns with the distance, so it is no constant of a row, which softmax would ignore.
    """
    return replace(moments, key_mean=torch.zeros_like(moments.key_mean))


class Rotations:
    """Averages of R_n x and R_n x yᵀ R_nᵀ for stacks x and y of heads, over n = 0 .. positions - 1 with equal weight.

    A head's pair i is the complex number z_i, which R_n multiplies by e^{j n θ_i}. So E[z_i z̄_k] is multiplied by the
    average of e^{j n (θ_i - θ_k)} and E[z_i z_k] by that of e^{j n (θ_i + θ_k)}, and both together are the real moments.
    """

    def __init__(self, rope: Rope, positions: int) -> None:
        angles = (
            torch.arange(positions, dtype=torch.float64)[:, None] * rope.inv_freq.double()
        )  # [positions, d/2]
        self._set(angles, torch.full((positions,), 1 / positions, dtype=torch.float64))

    @classmethod
    def by_distance(cls, rope: Rope, distances: int) -> Rotations:
        """Over R_{-n} for n = 0 .. distances - 1, as a query n tokens later sees a key; every octave of n weighs alike.

        So weighted, near keys count as they do in attention, and far ones are not forgotten.
        """
        average, n = cls.__new__(cls), torch.arange(distances, dtype=torch.float64)
        weights = 1 / (n + 1)
        average._set(-n[:, None] * rope.inv_freq.double(), weights / weights.sum())
        return average

    def _set(self, angles: Tensor, weights: Tensor) -> None:
        phases = torch.polar(torch.ones_like(angles), angles)
        weighted = (weights[:, None] * phases).T
        self._mean = weighted.sum(1)  # [d/2]
        self._difference = weighted @ phases.conj()  # [d/2, d/2]
        self._sum = weighted @ phases

    def mean(self, x: Tensor) -> Tensor:
        """Of a stack [h·d]."""
        pairs = x.view(-1, 2, len(self._mean))
        turned = torch.complex(pairs[:, 0], pairs[:, 1]) * self._mean
        return torch.stack((turned.real, turned.imag), 1).flatten()

    def second(
        self, xy: Tensor, rows: Tensor | None = None, columns: Tensor | None = None, inverse: bool = False
    ) -> Tensor:
        """Of x yᵀ for stacks x [g·2p] and y [h·2q], turned back rather if `inverse`.

        `rows` [p] and `columns` [q] say which frequency each pair of x and of y turns with; None: those of a head [d/2].
        """
        half = len(self._mean)
        by_row, by_column = (slice(None) if each is None else each for each in (rows, columns))
        difference, total = (each[by_row][:, by_column] for each in (self._difference, self._sum))
        if inverse:
            difference, total = difference.conj(), total.conj()
        p, q = (half if each is None else len(each) for each in (rows, columns))
        blocks = xy.reshape(xy.shape[0] // (2 * p), 2, p, xy.shape[1] // (2 * q), 2, q)
        first, cross, turned, second = (
            blocks[:, 0, :, :, 0],
            blocks[:, 0, :, :, 1],
            blocks[:, 1, :, :, 0],
            blocks[:, 1, :, :, 1],
        )
        hermitian = torch.complex(first + second, turned - cross) * difference[:, None]  # E[z z̄]
        plain = torch.complex(first - second, turned + cross) * total[:, None]  # E[z z]
        mean, rest = (hermitian + plain) / 2, (hermitian - plain) / 2
        found = torch.stack(
            (torch.stack((mean.real, -rest.imag), 3), torch.stack((mean.imag, rest.real), 3)), 1
        )
        return found.reshape(xy.shape)
