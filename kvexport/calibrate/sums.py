"""Float64 sums of second moments from products in the dtype of the data.

A product of a bounded number of rows in float32 has a relative rounding error of about 1e-6, and takes half
the time of one in float64 or less. The rows are taken about a shift, which is the mean of the first ones:
so that a covariance is as accurate for vectors whose mean is far larger than their deviation.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 4096  # rows of one product


class SecondMomentSums:
    """Sums over samples of vectors x and x xᵀ, for one or several independent stacks of vectors.

    Samples may have weights; means are then weighted means.

    Attributes:
        count: number of samples.
    """

    def __init__(self, *shape: int, device: torch.device) -> None:
        """
        Args:
            shape: [n], or [stacks, n].
            device: where sums are kept until they are read.
        """
        self.count = 0
        self._weight = torch.zeros((), dtype=torch.float64, device=device)  # of all samples
        self._shift: Tensor | None = None
        self._sum = torch.zeros(shape, dtype=torch.float64, device=device)  # of x - shift
        self._second = torch.zeros(*shape, shape[-1], dtype=torch.float64, device=device)

    def add(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Add samples x [N, n] or [stacks, N, n]; returns x - shift in float32 or wider.

        Args:
            weights: of the samples, [N], none negative; None: 1.
        """
        x = wide(x)
        if self._shift is None:
            self._shift = x.mean(-2, keepdim=True)
        x = x - self._shift
        self.count += x.shape[-2]
        if weights is None:
            weights = x.new_ones(x.shape[-2])
        self._weight += weights.double().sum()
        for rows, each in zip(x.split(ROWS, dim=-2), weights.to(x).split(ROWS), strict=True):
            weighted = rows * each[:, None]
            self._second += weighted.transpose(-1, -2) @ rows
            self._sum += weighted.sum(-2)
        return x

    @property
    def shift(self) -> Tensor:
        """What samples are taken about, [n] or [stacks, n] float64."""
        return torch.zeros_like(self._sum) if self._shift is None else self._shift.squeeze(-2).double()

    @property
    def _total(self) -> Tensor:
        """The weight of all samples; 1 if there is none."""
        return torch.where(self._weight > 0, self._weight, 1.0)

    def shifted_mean(self) -> Tensor:
        """E[x - shift], [n] or [stacks, n] float64."""
        return self._sum / self._total

    def mean(self) -> Tensor:
        """E[x], on the CPU."""
        return (self.shift + self.shifted_mean()).cpu()

    def second(self) -> Tensor:
        """E[x xᵀ], [n, n] or [stacks, n, n] float64 on the CPU."""
        mixed = self.shift[..., :, None] * self.shifted_mean()[..., None, :]
        about = self._second / self._total + self.shift[..., :, None] * self.shift[..., None, :]
        return (about + mixed + mixed.transpose(-1, -2)).cpu()

    def covariance(self) -> Tensor:
        """E[x xᵀ] - E[x] E[x]ᵀ, [n, n] or [stacks, n, n] float64 on the CPU."""
        mean = self.shifted_mean()
        return (self._second / self._total - mean[..., :, None] * mean[..., None, :]).cpu()


def wide(x: Tensor) -> Tensor:
    """x in float32, or float64 if it is float64."""
    return x if x.dtype == torch.float64 else x.float()
