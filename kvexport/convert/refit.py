"""Refit of W_O: ridge least squares on the converted layer's own head outputs, towards the original stream.

Knows least squares on streamed moments; must not know where head outputs come from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvexport.decoder import Linear

_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean diagonal of G


class LeastSquares:
    """Float64 sums for y ≈ W x + b: E[x xᵀ], E[x yᵀ], E|y|² about the means."""

    def __init__(self, into: int, out: int) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        self._count = 0
        self._xx, self._xy, self._x, self._y = zeros(into, into), zeros(into, out), zeros(into), zeros(out)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in x [..., into] and y [..., out]."""
        x, y = x.double().flatten(0, -2), y.double().flatten(0, -2)
        self._count += len(x)
        self._xx.addmm_(x.T, x)
        self._xy.addmm_(x.T, y)
        self._x += x.sum(0)
        self._y += y.sum(0)

    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cov(x) [into, into], Cov(x, y) [into, out], and the means of x and y."""
        count = max(self._count, 1)
        x, y = self._x / count, self._y / count
        return self._xx / count - torch.outer(x, x), self._xy / count - torch.outer(x, y), x, y


def refit(o: Linear, seen: LeastSquares, held_out: LeastSquares) -> Linear:
    """W_O' = argmin |y - W x - b|² + λ|W - W_O|², with b free and λ the ridge that held-out tokens like best.

    Among the ridges is the infinite one, which keeps W_O and fits b alone, so refitting W_O never costs on the
    held-out tokens.
    """
    gram, cross, x, y = seen.centred()
    prior = o.weight.double()
    residual = cross - gram @ prior.T  # [into, out]
    scale = gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    identity = torch.eye(len(gram), dtype=torch.float64)
    best, least = prior, _loss(prior, held_out)
    for ridge in _RIDGES:
        factor, failed = torch.linalg.cholesky_ex(gram + ridge * scale * identity)
        if failed:
            continue
        candidate = prior + torch.cholesky_solve(residual, factor).T
        loss = _loss(candidate, held_out)
        if loss < least:
            best, least = candidate, loss
    return Linear(best.to(o.weight.dtype), (y - best @ x).to(o.weight.dtype))


def _loss(weight: Tensor, moments: LeastSquares) -> float:
    """E|y - W x|² about the means, less the constant E|y|²."""
    gram, cross, _, _ = moments.centred()
    return float(((weight @ gram) * weight).sum() - 2 * (weight.T * cross).sum())
