"""Sums of outer products over tokens, in float64 where that is fast and as accurate elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 4096  # tokens of one float32 product


class OuterSum:
    """Float64 sums over rows x [n, a] and y [n, b]: Σ x, Σ y and Σ x yᵀ.

    On the CPU products are computed in float64. GPUs for consumers compute float64 up to 64 times more slowly
    than float32; so on other devices products of at most `ROWS` rows are computed in float32 and added in
    float64. They are taken about the means of the first rows, so that the covariance of vectors with a large
    mean stays accurate. Rows in float64 are multiplied in float64 on every device.
    """

    def __init__(self, into: int, out: int) -> None:
        """
        Args:
            into: width a of x.
            out: width b of y.
        """
        self.count = 0
        self._x, self._y = torch.zeros(into, dtype=torch.float64), torch.zeros(out, dtype=torch.float64)
        self._xy = torch.zeros(into, out, dtype=torch.float64)
        self._origins: tuple[Tensor, Tensor] | None = None  # None: zero

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows x [n, a] and y [n, b]; x and y may be one tensor."""
        same, dtype = y is x, _dtype_of_products(x)
        x = x.to(dtype)
        y = x if same else y.to(dtype)
        if dtype != torch.float64:
            if self._origins is None:
                self._origins = x.mean(0), y.mean(0)
            x = x - self._origins[0]
            y = x if same else y - self._origins[1]
        self.count += len(x)
        self._x, self._y, self._xy = (each.to(x.device) for each in (self._x, self._y, self._xy))
        for rows, columns in zip(x.split(ROWS), y.split(ROWS), strict=True):
            if dtype == torch.float64:
                self._xy.addmm_(rows.T, columns)
            else:
                self._xy += rows.T @ columns
        self._x += x.sum(0, dtype=torch.float64)
        self._y += y.sum(0, dtype=torch.float64)

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Σ x [a], Σ y [b] and Σ x yᵀ [a, b], float64 on the CPU."""
        x, y, xy = (each.cpu() for each in (self._x, self._y, self._xy))
        if self._origins is None:
            return x, y, xy
        at_x, at_y = (origin.double().cpu() for origin in self._origins)
        xy = xy + torch.outer(at_x, y) + torch.outer(x + self.count * at_x, at_y)
        return x + self.count * at_x, y + self.count * at_y, xy


def _dtype_of_products(x: Tensor) -> torch.dtype:
    return torch.float64 if x.device.type == "cpu" or x.dtype == torch.float64 else torch.float32
