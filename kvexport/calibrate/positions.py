"""Moments of keys and queries as they meet in the dot product, over all positions of the deployed context.

What a token's key and query are before rotation hardly depends on where it stands, so their moments after rotation,
averaged over any range of positions, follow from those before it in closed form. A code made for the positions of
the calibration windows alone fails beyond them. Knows RoPE; must not know what the moments are for.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvexport.calibrate.moments import Moments
from kvexport.decoder import Rope


def over_positions(moments: Moments, rope: Rope, positions: int) -> Moments:
    """Unrotated moments as rotated ones, at positions 0 .. positions - 1 with equal weight."""
    average = Rotations(rope, positions)
    return replace(
        moments,
        key_mean=average.mean(moments.key_mean),
        key_second=average.second(moments.key_second),
        query_second=torch.stack([average.second(each) for each in moments.query_second]),
    )


def over_distances(moments: Moments, rope: Rope, distances: int) -> Moments:
    """Unrotated moments with the queries as keys 0 .. distances - 1 positions before them see them, and keys uncentred.

    For codes that commute with rotation: only the distance between query and key matters then, not where both stand.
    """
    average = Rotations(rope, distances)
    return replace(
        moments,
        key_mean=torch.zeros_like(moments.key_mean),  # its share of a logit turns with the distance: no constant of a row
        query_second=torch.stack([average.second(each) for each in moments.query_second]),
    )


class Rotations:
    """Averages of R_n x and R_n x yᵀ R_nᵀ over n = 0 .. positions - 1, for stacks x and y of heads.

    A head's pair i is the complex number z_i, which R_n multiplies by e^{j n θ_i}. So E[z_i z̄_k] is multiplied by the
    average of e^{j n (θ_i - θ_k)} and E[z_i z_k] by that of e^{j n (θ_i + θ_k)}, and both together are the real moments.
    """

    def __init__(self, rope: Rope, positions: int) -> None:
        theta = rope.inv_freq.double()
        angles = torch.arange(positions, dtype=torch.float64)[:, None] * theta  # [positions, d/2]
        phases = torch.polar(torch.ones_like(angles), angles)
        self._mean = phases.mean(0)  # [d/2]
        self._difference = phases.T @ phases.conj() / positions  # [d/2, d/2]
        self._sum = phases.T @ phases / positions

    def mean(self, x: Tensor) -> Tensor:
        """Of a stack [h·d]."""
        pairs = x.view(-1, 2, len(self._mean))
        turned = torch.complex(pairs[:, 0], pairs[:, 1]) * self._mean
        return torch.stack((turned.real, turned.imag), 1).flatten()

    def second(self, xy: Tensor) -> Tensor:
        """Of E[x yᵀ] for stacks x [g·d] and y [h·d]."""
        half = len(self._mean)
        blocks = xy.view(xy.shape[0] // (2 * half), 2, half, xy.shape[1] // (2 * half), 2, half)
        first, cross, turned, second = blocks[:, 0, :, :, 0], blocks[:, 0, :, :, 1], blocks[:, 1, :, :, 0], blocks[:, 1, :, :, 1]
        hermitian = torch.complex(first + second, turned - cross) * self._difference[:, None]  # E[z z̄]
        plain = torch.complex(first - second, turned + cross) * self._sum[:, None]  # E[z z]
        total, rest = (hermitian + plain) / 2, (hermitian - plain) / 2
        found = torch.stack((torch.stack((total.real, -rest.imag), 3), torch.stack((total.imag, rest.real), 3)), 1)
        return found.reshape(xy.shape)
