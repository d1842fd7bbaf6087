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
        query_second=average.second(moments.query_second),
    )


def uncentre_keys(moments: Moments) -> Moments:
    """Set the mean key to zero, so that covariances of keys become second moments: for codes before RoPE.

    The mean key's part of a logit changes with the distance, so it is not a constant of a row that softmax
    ignores.
    """
    return replace(moments, key_mean=torch.zeros_like(moments.key_mean))


class Rotations:
    """Averages of R_n x and R_n x yᵀ R_nᵀ over positions n, for stacks x and y of heads.

    R_n multiplies pair i of a head by c_i + s_i J, where c_i = m_i cos n θ_i, s_i = m_i sin n θ_i, m is the
    magnitude of RoPE, and J the rotation by a quarter turn. So the average of R_n x yᵀ R_nᵀ follows from the
    averages of c_i c_k, s_i s_k and s_i c_k.
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
        lengths = 1.0 if magnitude is None else magnitude.double()
        cos, sin = lengths * angles.cos(), lengths * angles.sin()
        weights = weights[:, None]
        self._mean_cos, self._mean_sin = (weights * cos).sum(0), (weights * sin).sum(0)  # [d/2]
        self._cos_cos = (weights * cos).T @ cos  # [d/2, d/2]
        self._sin_sin = (weights * sin).T @ sin
        self._sin_cos = (weights * sin).T @ cos

    def mean(self, x: Tensor) -> Tensor:
        """Average of R_n x for a stack x [h·d]."""
        first, second = x.view(-1, 2, len(self._mean_cos)).unbind(1)
        cos, sin = self._mean_cos, self._mean_sin
        return torch.stack((first * cos - second * sin, second * cos + first * sin), 1).flatten()

    def second(self, xy: Tensor) -> Tensor:
        """Average of R_n x yᵀ R_nᵀ for stacks x and y of trained heads, from x yᵀ or its expectation, of the
        same shape [..., g·d, h·d].
        """
        return self.of_pairs()(xy)

    def of_pairs(
        self, rows: Tensor | None = None, columns: Tensor | None = None, inverse: bool = False
    ) -> PairAverage:
        """The average of R_n x yᵀ R_nᵀ for stacks x and y of pairs that rotate with assigned frequencies.

        Args:
            rows: index of the RoPE frequency of each pair of x, [..., p] int64; None: those of a trained
                head, p = d/2.
            columns: the same for y, [..., q] int64.
            inverse: average R_{-n} x yᵀ R_{-n}ᵀ instead.
        """
        whole = torch.arange(len(self._mean_cos))
        at = (
            (whole if rows is None else rows)[..., :, None],
            (whole if columns is None else columns)[..., None, :],
        )
        sign = -1 if inverse else 1
        return PairAverage(
            self._cos_cos[at], self._sin_sin[at], sign * self._sin_cos[at], sign * self._sin_cos.T[at]
        )


class PairAverage:
    """The average of R_n x yᵀ R_nᵀ over positions n as a linear function of x yᵀ, for given pairs of x and y.

    The 2 x 2 block X of x yᵀ for pair i of x and pair k of y becomes
    E[c_i c_k] X + E[s_i s_k] J X Jᵀ + E[s_i c_k] J X + E[c_i s_k] X Jᵀ.
    """

    def __init__(self, cos_cos: Tensor, sin_sin: Tensor, sin_cos: Tensor, cos_sin: Tensor) -> None:
        """
        Args:
            cos_cos: E[c_i c_k], [..., p, q] float64.
            sin_sin: E[s_i s_k], of the same shape, as the others.
            sin_cos: E[s_i c_k].
            cos_sin: E[c_i s_k].
        """
        self._pairs = cos_cos.shape[-2:]

        # J X is X with its rows swapped and the first negated, X Jᵀ the same for columns.
        def blocks(first: Tensor, second: Tensor, third: Tensor, fourth: Tensor) -> Tensor:
            """2 x 2 blocks, [..., 1, 2, p, 1, 2, q]."""
            rows = torch.stack((first, second), -2), torch.stack((third, fourth), -2)
            return torch.stack(rows, -4).unsqueeze(-3).unsqueeze(-6)

        self._kept = blocks(cos_cos, cos_cos, cos_cos, cos_cos)
        self._columns_swapped = blocks(-cos_sin, cos_sin, -cos_sin, cos_sin)
        self._rows_swapped = blocks(sin_cos, sin_cos, -sin_cos, -sin_cos)
        self._both_swapped = blocks(-sin_sin, sin_sin, sin_sin, -sin_sin)

    def __call__(self, xy: Tensor) -> Tensor:
        """The average, [..., g·2p, h·2q], for x yᵀ or its expectation, of the same shape."""
        p, q = self._pairs
        x = xy.unflatten(-1, (-1, 2, q)).unflatten(-4, (-1, 2, p))  # [..., g, 2, p, h, 2, q]
        swapped = x.flip(-2)
        average = self._kept * x
        average.addcmul_(self._columns_swapped, swapped)
        rows = self._rows_swapped * x
        rows.addcmul_(self._both_swapped, swapped)
        return average.add_(rows.flip(-5)).flatten(-3).flatten(-4, -2)
