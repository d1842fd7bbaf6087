"""Refit of W_O by ridge least squares on the converted layer's own head outputs.

W_O' = argmin_W,b E|y - W x - b|² + λ |W - W_O|², where x is the converted layer's concatenated head outputs
and y what its attention must add to the converted residual stream to give the trained one. With centred
moments G = Cov(x) and C = Cov(x, y): W_O'ᵀ = (G + λ I)⁻¹ (C + λ W_Oᵀ). Where b is fixed, G = E[x xᵀ] and
C = E[x (y - b)ᵀ].
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvexport.model.decoder import Linear

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean diagonal of G


class LeastSquares:
    """Float64 sums over tokens for y ≈ W x + b."""

    def __init__(self, into: int, out: int) -> None:
        """
        Args:
            into: width of x.
            out: width of y.
        """

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        self._count = 0
        self._xx, self._xy, self._x, self._y = zeros(into, into), zeros(into, out), zeros(into), zeros(out)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add samples x [..., into] and y [..., out]."""
        x, y = x.double().flatten(0, -2), y.double().flatten(0, -2)
        self._count += len(x)
        self._xx.addmm_(x.T, x)
        self._xy.addmm_(x.T, y)
        self._x += x.sum(0)
        self._y += y.sum(0)

    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cov(x) [into, into], Cov(x, y) [into, out], mean of x [into], mean of y [out]."""
        count = max(self._count, 1)
        x, y = self._x / count, self._y / count
        return self._xx / count - torch.outer(x, x), self._xy / count - torch.outer(x, y), x, y

    def around(self, bias: Tensor) -> tuple[Tensor, Tensor]:
        """E[x xᵀ] [into, into] and E[x (y - b)ᵀ] [into, out] for b [out]."""
        count = max(self._count, 1)
        return self._xx / count, (self._xy - torch.outer(self._x, bias)) / count

    def loss(self, weight: Tensor, bias: Tensor) -> float:
        """E|y - W x - b|² minus Var(y), which depends on neither W [out, into] nor b [out]."""
        gram, cross, x, y = self.centred()
        offset = (y - weight @ x - bias).square().sum()
        return float(((weight @ gram) * weight).sum() - 2 * (weight.T * cross).sum() + offset)


def refit(o: Linear, train: LeastSquares, held_out: LeastSquares, *, fit_bias: bool = True) -> Linear:
    """Refit W_O on training tokens, with the ridge λ that gives the least loss on held-out tokens.

    The candidates include λ = ∞, which keeps W_O and fits b alone, and `o` unchanged; so the refit never
    increases the loss on held-out tokens.

    Args:
        o: the output projection W_O [hidden, H·width] with its bias, if any.
        train: sums over training tokens.
        held_out: sums over held-out tokens.
        fit_bias: whether b is fitted; otherwise it stays as it is.
    """
    gram, cross, x, y = train.centred()
    prior = o.weight.double()
    given = torch.zeros_like(y) if o.bias is None else o.bias.double()
    if not fit_bias:
        gram, cross = train.around(given)
    residual = cross - gram @ prior.T  # [into, out]
    scale = gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    best, least = o, held_out.loss(prior, given)
    for ridge in (None, *RIDGES):
        weight = prior
        if ridge is not None:
            ridged = gram.clone()
            ridged.diagonal().add_(ridge * scale)
            factor, failed = torch.linalg.cholesky_ex(ridged)
            if failed:
                continue
            weight = prior + torch.cholesky_solve(residual, factor).T
        bias = y - weight @ x if fit_bias else given
        loss = held_out.loss(weight, bias)
        if loss < least:
            stored = bias.to(o.weight.dtype) if fit_bias else o.bias
            best, least = Linear(weight.to(o.weight.dtype), stored), loss
    return best
