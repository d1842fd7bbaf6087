"""Refit of W_O by ridge least squares on the converted layer's own head outputs.

W_O' = W_O + D and b' = b + e with D, e = argmin E|r - D x - e|² + λ |D|², where x is the converted layer's
concatenated head outputs, y what its attention must add to the converted residual stream to give the trained
one, and r = y - W_O x - b what it misses. With centred moments G = Cov(x) and C = Cov(x, r):
Dᵀ = (G + λ I)⁻¹ C. Where b is fixed, e = 0, G = E[x xᵀ] and C = E[x rᵀ].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvexport.calibrate.sums import ROWS, SecondMomentSums, wide
from kvexport.model.decoder import Linear
from kvexport.model.reference import linear

RIDGES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # of the mean diagonal of G


class LeastSquares:
    """Float64 sums over tokens for r ≈ D x + e, where r = y - W_O x - b."""

    def __init__(self, o: Linear) -> None:
        """`o`: the output projection W_O [out, into] with its bias b, if any."""
        self._o = o
        out, into = o.weight.shape
        self._x = SecondMomentSums(into, device=o.weight.device)
        self._cross = o.weight.new_zeros(into, out, dtype=torch.float64)  # of (x - shift) rᵀ
        self._r = o.weight.new_zeros(out, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add samples x [..., into] and y [..., out]."""
        x = x.flatten(0, -2)
        missing = wide(y.flatten(0, -2) - linear(self._o, x))
        centred = self._x.add(x)
        for rows, missed in zip(centred.split(ROWS), missing.split(ROWS), strict=True):
            self._cross += rows.T @ missed
            self._r += missed.sum(0)

    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cov(x) [into, into], Cov(x, r) [into, out], mean of x [into], mean of r [out]; on the CPU."""
        r, cross = self._means()
        cross = cross - torch.outer(self._x.shifted_mean().cpu(), r)
        return self._x.covariance(), cross, self._x.mean(), r

    def uncentred(self) -> tuple[Tensor, Tensor]:
        """E[x xᵀ] [into, into] and E[x rᵀ] [into, out], on the CPU."""
        r, cross = self._means()
        return self._x.second(), cross + torch.outer(self._x.shift.cpu(), r)

    def _means(self) -> tuple[Tensor, Tensor]:
        """E[r] and E[(x - shift) rᵀ]."""
        count = max(self._x.count, 1)
        return (self._r / count).cpu(), (self._cross / count).cpu()


def _loss(centred: tuple[Tensor, Tensor, Tensor, Tensor], change: Tensor | None, offset: Tensor) -> float:
    """E|r - D x - e|² minus Var(r), which depends on neither D [out, into] nor e [out], from
    `LeastSquares.centred`; None: D = 0.
    """
    gram, cross, x, r = centred
    if change is None:
        return float((r - offset).square().sum())
    constant = (r - change @ x - offset).square().sum()
    return float(((change @ gram) * change).sum() - 2 * (change.T * cross).sum() + constant)


def refit(o: Linear, train: LeastSquares, held_out: LeastSquares, *, fit_bias: bool = True) -> Linear:
    """Refit W_O on training tokens, with the ridge λ that gives the least loss on held-out tokens.

    From the largest λ on, until the loss increases: each λ takes the time of a solve and two products. The
    candidates include λ = ∞, which keeps W_O and fits b alone, and `o` unchanged; so the refit never
    increases the loss on held-out tokens.

    Args:
        o: the output projection W_O [hidden, H·width] with its bias, if any.
        train: sums over training tokens, of `o`.
        held_out: sums over held-out tokens, of `o`.
        fit_bias: whether b is fitted; otherwise it stays as it is.
    """
    gram, cross, x, r = train.centred()
    if not fit_bias:
        gram, cross = train.uncentred()
    scale = gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    zero, tested = torch.zeros_like(r), held_out.centred()
    best, least, last = o, _loss(tested, None, zero), math.inf
    for ridge in (None, *RIDGES):
        change = None
        if ridge is not None:
            ridged = gram.clone()
            ridged.diagonal().add_(ridge * scale)
            factor, failed = torch.linalg.cholesky_ex(ridged)
            if failed:
                break
            change = torch.cholesky_solve(cross, factor).T
        offset = zero
        if fit_bias:
            offset = r if change is None else r - change @ x
        loss = _loss(tested, change, offset)
        if loss < least:
            best, least = _changed(o, change, offset if fit_bias else None), loss
        if loss > last:
            break
        last = loss
    return best


def _changed(o: Linear, change: Tensor | None, offset: Tensor | None) -> Linear:
    """W_O + D and b + e, in the dtype and on the device of `o`; None: W_O or b stays."""
    weight = o.weight if change is None else (o.weight.double().cpu() + change).to(o.weight)
    if offset is None:
        return Linear(weight, o.bias)
    return Linear(weight, (offset if o.bias is None else o.bias.double().cpu() + offset).to(o.weight))
