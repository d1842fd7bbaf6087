"""Codes of rotary keys that commute with RoPE, so that they hold at every position and fold into W_Q and W_K.

A head's rotary pair i is the complex number z_i = k[i] + j k[i + d/2]. Rotation multiplies that of every head by the same
phase, so cached pairs c_p = Σ_h ē_hp z_h,f(p), each a complex mix of the group's heads at one frequency f(p), rotate as
keys do, and so do the rebuilt ẑ_h,i = Σ_{f(p)=i} u_hp c_p. Within that form the loss tr(S · E[(z - ẑ)(z - ẑ)ᵀ]) is
minimised over e and u in turn, each a least squares over all frequencies at once: pairs that turn slowly, or queries near
their keys, see errors of several frequencies add up, which a code for each frequency alone cannot know.

Knows moments and complex mixes; must not know how a code is put into a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvexport.calibrate import Moments
from kvexport.convert.codes import Code
from kvexport.convert.groups import Grouping

_ROUNDS = 6  # of e and u; the loss has settled by then
_RIDGE = 1e-9  # of the mean diagonal


@dataclass(frozen=True)
class Mixes:
    """A commuting code of t heads in P cached pairs: complex e and u [t, P] as [t, P, 2], and the frequency of each pair [P]."""

    into: Tensor
    out: Tensor
    frequencies: Tensor

    def code(self, half: int) -> Code:
        """As real matrices [t·2·half, 2·P], with the mixes scaled so that every cached pair weighs alike in `out`."""
        size, pairs = self.out.shape[:2]
        norm = self.out.square().sum((0, 2)).sqrt()[:, None]
        norm = torch.where(norm > 0, norm, torch.ones_like(norm))
        return Code(
            _matrix(self.into * norm, self.frequencies, half).reshape(size * 2 * half, 2 * pairs),
            _matrix(self.out / norm, self.frequencies, half).reshape(size * 2 * half, 2 * pairs),
        )


def commuting_code(moments: Moments, weights: Tensor, grouping: Grouping, group: int, frequencies: Tensor) -> Code:
    """The code of one group.

    Args:
        moments: keys before rotation; queries as `over_distances` gives them.
        weights: S of each head of the group, [t, d, d].
        frequencies: of the cached pairs, [P] int64, ascending; a frequency may have several, up to t.
    """
    size, half = grouping.size, grouping.head_dim // 2
    rows = grouping.rows(group)
    second = moments.key_second[rows, rows].view(size, 2, half, size, 2, half)
    problem = _Problem(weights.view(size, 2, half, 2, half), second, frequencies)
    mixes = _by_frequency(weights, second, frequencies)
    for _ in range(_ROUNDS):
        out = problem.best_out(mixes.into)
        mixes = Mixes(problem.best_into(out), out, frequencies)
    return Mixes(mixes.into, problem.best_out(mixes.into), frequencies).code(half)


def mix_energies(moments: Moments, weights: Tensor, grouping: Grouping, group: int) -> Tensor:
    """What each orthogonal mix of a group's heads at one frequency puts into logits, phases averaged: [d/2, t], descending.

    A pair left out costs E|w|² E|z|² / 2 a frequency, w the query's (papers' section 6.1 in complex form).
    """
    size, half, rows = grouping.size, grouping.head_dim // 2, grouping.rows(group)
    _, weighted = _weighted_by_frequency(weights, moments.key_second[rows, rows].view(size, 2, half, size, 2, half))
    return torch.linalg.eigvalsh(weighted).flip(-1).clamp_min(0) / 2


def _weighted_by_frequency(weights: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """b, the root of each head's query power [d/2, t], and b E[z zᴴ] b at each frequency [d/2, t, t]."""
    size, _, half = second.shape[:3]
    pairs = second.diagonal(dim1=2, dim2=5).movedim(-1, 0)  # [d/2, t, 2, t, 2]
    hermitian = torch.complex(pairs[:, :, 0, :, 0] + pairs[:, :, 1, :, 1], pairs[:, :, 1, :, 0] - pairs[:, :, 0, :, 1])
    power = weights.diagonal(dim1=1, dim2=2).view(size, 2, half).sum(1).T
    least = torch.where(power.max() > 0, power.max() * 1e-12, torch.ones(()))  # a head that nobody asks still has a code
    b = power.clamp_min(least).sqrt()
    return b, b[:, :, None] * hermitian * b[:, None, :]


def _by_frequency(weights: Tensor, second: Tensor, frequencies: Tensor) -> Mixes:
    """The best code of each frequency by itself, phases averaged: the first guess."""
    b, weighted = _weighted_by_frequency(weights, second)
    vectors = torch.linalg.eigh(weighted).eigenvectors.flip(-1)
    place = torch.arange(len(frequencies)) - torch.searchsorted(frequencies, frequencies)  # first, second, ... of a frequency
    leading = vectors[frequencies, :, place]  # [P, t]
    scale = b[frequencies]
    into, out = (scale * leading).T, (leading / scale).T
    return Mixes(torch.view_as_real(into.contiguous()), torch.view_as_real(out.contiguous()), frequencies)


class _Problem:
    """tr(S · E[(z - ẑ)(z - ẑ)ᵀ]) of one group as least squares in u, and in e; S [t, 2, d/2, 2, d/2] is block diagonal.

    Multiplication by a complex number a + jb is a·I + b·J, J the quarter turn of a pair.
    """

    def __init__(self, weights: Tensor, second: Tensor, frequencies: Tensor) -> None:
        self._frequencies = frequencies
        self._weights = weights[:, :, frequencies][..., frequencies]  # of cached pairs' frequencies, [t, 2, P, 2, P]
        self._half_weights = weights[:, :, frequencies]  # [t, 2, P, 2, d/2]
        mixed = second[:, :, frequencies][..., frequencies]  # E[z zᵀ], [t, 2, P, t, 2, P]
        self._turned = {(a, b): _turn(_turn(mixed, 1, a), 4, b) for a in (0, 1) for b in (0, 1)}
        self._crossed = second[..., frequencies]  # E[k zᵀ], [t, 2, d/2, t, 2, P]

    def best_out(self, into: Tensor) -> Tensor:
        """u [t, P, 2] for given e."""
        size, pairs = into.shape[:2]
        parts = (into[..., 0], -into[..., 1])  # conjugated
        crossed = self._crossed.new_zeros(*self._crossed.shape[:3], 2, pairs)  # E[k cᵀ], [t, 2, d/2, 2, P]
        cached = self._crossed.new_zeros(2, pairs, 2, pairs)  # E[c cᵀ]
        for a in (0, 1):
            crossed += torch.einsum("kxihyp,hp->kxiyp", _turn(self._crossed, 4, a), parts[a])
            for b in (0, 1):
                cached += torch.einsum("hp,hxpgyq,gq->xpyq", parts[a], self._turned[a, b], parts[b])
        normal = torch.empty(size, pairs, 2, pairs, 2, dtype=into.dtype)
        wanted = torch.empty(size, pairs, 2, dtype=into.dtype)
        for a in (0, 1):
            for b in (0, 1):
                normal[:, :, a, :, b] = (self._weights * _turn(_turn(cached, 0, a), 2, b)).sum((1, 3))
            wanted[:, :, a] = torch.einsum("hxpyi,hyixp->hp", self._half_weights, _turn(crossed, 3, a))
        return _solve(normal.reshape(size, 2 * pairs, -1), wanted.reshape(size, -1)).view(size, pairs, 2)

    def best_into(self, out: Tensor) -> Tensor:
        """e [t, P, 2] for given u."""
        size, pairs = out.shape[:2]
        asked = self._crossed.new_zeros(2, pairs, 2, pairs)  # Uᵀ S U
        crossed = self._crossed.new_zeros(2, pairs, size, 2, pairs)  # Uᵀ S E[k zᵀ]
        for head in range(size):
            asked += _asked(_asked(self._weights[head], out[head], 0), out[head], 2)
            crossed += torch.einsum("xpyi,yigzq->xpgzq", _asked(self._half_weights[head], out[head], 0), self._crossed[head])
        normal = torch.empty(size, pairs, 2, size, pairs, 2, dtype=out.dtype)
        wanted = torch.empty(size, pairs, 2, dtype=out.dtype)
        for a in (0, 1):
            for b in (0, 1):
                normal[:, :, a, :, :, b] = (self._turned[a, b] * asked[None, :, :, None]).sum((1, 4))
            own = _turn(crossed, 3, a).diagonal(dim1=1, dim2=4)  # [2, t, 2, P]
            wanted[:, :, a] = own[0, :, 0] + own[1, :, 1]
        found = _solve(normal.reshape(2 * size * pairs, -1), wanted.flatten()).view(size, pairs, 2)
        return torch.stack((found[..., 0], -found[..., 1]), -1)


def _turn(x: Tensor, axis: int, times: int = 1) -> Tensor:
    """J applied to the axis of the two parts of pairs, or the identity."""
    if not times:
        return x
    real, imaginary = x.unbind(axis)
    return torch.stack((-imaginary, real), axis)


def _asked(x: Tensor, mix: Tensor, axis: int) -> Tensor:
    """(a·I + b·J)ᵀ applied to the axis of parts, whose pairs are on the next; `mix` [P, 2]."""
    shape = [1] * x.dim()
    shape[axis + 1] = len(mix)
    return x * mix[:, 0].view(shape) - _turn(x, axis) * mix[:, 1].view(shape)


def _solve(normal: Tensor, wanted: Tensor) -> Tensor:
    scale = normal.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # of a head that nobody asks, nothing is wanted
    return torch.linalg.solve(normal + _RIDGE * scale * torch.eye(normal.shape[-1], dtype=normal.dtype), wanted)


def _matrix(mix: Tensor, frequencies: Tensor, half: int) -> Tensor:
    """Multiplication of cached pairs by the mixes [t, P, 2] as a real matrix [t, 2, d/2, 2, P]."""
    size, pairs = mix.shape[:2]
    matrix, at = torch.zeros(size, 2, half, 2, pairs, dtype=mix.dtype), torch.arange(pairs)
    matrix[:, 0, frequencies, 0, at] = matrix[:, 1, frequencies, 1, at] = mix[..., 0]
    matrix[:, 0, frequencies, 1, at] = -mix[..., 1]
    matrix[:, 1, frequencies, 0, at] = mix[..., 1]
    return matrix
