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
        self._shift: Tensor | None = None
        self._sum = torch.zeros(shape, dtype=torch.float64, device=device)  # of x - shift
        self._second = torch.zeros(*shape, shape[-1], dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> Tensor:
        """Add samples x [N, n] or [stacks, N, n]; returns x - shift in float32 or wider."""
        x = wide(x)
        if self._shift is None:
            self._shift = x.mean(-2, keepdim=True)
        x = x - self._shift
        self.count += x.shape[-2]
        for rows in x.split(ROWS, dim=-2):
            self._second += rows.transpose(-1, -2) @ rows
            self._sum += rows.sum(-2)
        return x

    @property
    def shift(self) -> Tensor:
        """What samples are taken about, [n] or [stacks, n] float64."""
        return torch.zeros_like(self._sum) if self._shift is None else self._shift.squeeze(-2).double()

    def shifted_mean(self) -> Tensor:
        """E[x - shift], [n] or [stacks, n] float64."""
        return self._sum / max(self.count, 1)

    def mean(self) -> Tensor:
        """E[x], on the CPU."""
        return (self.shift + self.shifted_mean()).cpu()

    def second(self) -> Tensor:
        """E[x xᵀ], [n, n] or [stacks, n, n] float64 on the CPU."""
        mixed = self.shift[..., :, None] * self.shifted_mean()[..., None, :]
        about = self._second / max(self.count, 1) + self.shift[..., :, None] * self.shift[..., None, :]
        return (about + mixed + mixed.transpose(-1, -2)).cpu()

    def covariance(self) -> Tensor:
        """E[x xᵀ] - E[x] E[x]ᵀ, [n, n] or [stacks, n, n] float64 on the CPU."""
        mean = self.shifted_mean()
        return (self._second / max(self.count, 1) - mean[..., :, None] * mean[..., None, :]).cpu()


def wide(x: Tensor) -> Tensor:
    """x in float32, or float64 if it is float64."""
    return x if x.dtype == torch.float64 else x.float()
