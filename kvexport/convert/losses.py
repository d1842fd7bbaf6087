"""Loss of a group of KV heads at every width of the cached head, from a layer's moments.

A loss is the power of the error of the attention output, E|Δo|², by the same model as
`kvexport.convert.predict`; losses of keys, values and groups add. One eigenvalue problem per side gives the
losses at all widths; only keys coded before RoPE need codes made at a few widths. n = t·d below is the width
of the group's stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kvexport.calibrate import Moments
from kvexport.convert.code_moments import CodeMoments
from kvexport.convert.folding import Folding, mix_energies
from kvexport.convert.groups import WIDEST, Grouping
from kvexport.convert.keys import frequencies_with_most, query_weights
from kvexport.convert.matching import PROPOSALS, Group, match_heads
from kvexport.convert.values import stacked_output_weights
from kvexport.model.decoder import Attention

# widths, as shares of n, at which codes before RoPE are made; losses between them are interpolated
_SAMPLED_SHARES = (1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
_TINY = 1e-12
_ROUNDS = 8  # alternations of a code whose loss is measured; those of a final code gain a few per cent more
# width of a stack up to which all swaps are proposed; fewer beyond, so that the time is bounded
_ANNEALED = 128


class ValueLosses:
    """Losses of values of groups of one layer's KV heads, each computed once; the same for all methods."""

    def __init__(self, moments: Moments, attention: Attention) -> None:
        """
        Args:
            moments: moments of the unconverted layer.
            attention: the unconverted layer.
        """
        self._width = attention.head_dim
        self._outputs = stacked_output_weights(moments, attention)  # S of all heads, [h·d, h·d]
        self._covariance = moments.value_covariance(slice(None))  # [h·d, h·d]
        self._losses: dict[Group, Tensor] = {}

    def of(self, group: Group) -> Tensor:
        """Loss at widths 0 .. n, [n + 1] float64."""
        if group not in self._losses:
            root = _root(_block(self._covariance, group, self._width))
            weights = _block(self._outputs, group, self._width)
            self._losses[group] = _tails(torch.linalg.eigvalsh(root.T @ weights @ root))
        return self._losses[group]


class LayerLosses:
    """Losses of groups of one unconverted layer's KV heads.

    What depends on one head or on two is computed once for the layer; a group takes its blocks of it.
    """

    def __init__(
        self, code_moments: CodeMoments, attention: Attention, values: ValueLosses | None = None
    ) -> None:
        """
        Args:
            code_moments: moments on the side of RoPE on which the method codes keys.
            attention: the unconverted layer.
            values: losses of its values, if they are shared with another method.
        """
        self._code_moments, self._attention = code_moments, attention
        moments = self._moments = code_moments.moments
        self.values = (values or ValueLosses(moments, attention)).of
        self._each = each = Grouping.of(attention, attention.num_kv_heads)
        self._weights = torch.stack([query_weights(moments, each, head) for head in range(each.kv_heads)])

    @cached_property
    def _keys(self) -> Tensor:
        """Covariance of the keys, weighted by the roots of S on both sides, [h·d, h·d]."""
        values, vectors = torch.linalg.eigh(self._weights)
        roots = vectors * values.clamp_min(0).sqrt()[:, None] @ vectors.transpose(1, 2)
        root = torch.block_diag(*roots) * self._attention.scale
        return root @ self._moments.key_covariance(slice(None)) @ root

    def match(self, before_rotation: bool, size: int, key_width: int, value_width: int) -> list[Group]:
        """Groups of `size` heads with a small loss of keys and values together.

        Args:
            before_rotation: whether keys are coded before RoPE.
            size: heads per group.
            key_width: width of a group's cached key.
            value_width: width of a group's cached value.
        """

        def loss(group: Group) -> float:
            # part of a group gets its share of the widths
            key, value = (width * len(group) // size for width in (key_width, value_width))
            return float(self.estimate(before_rotation, group)[key] + self.values(group)[value])

        # a loss takes the time of an eigenvalue problem, cubic in the width of the stack
        share = min(1.0, (_ANNEALED / (size * self._each.head_dim)) ** 3)
        return match_heads(self._each.kv_heads, size, loss, int(PROPOSALS * share))

    def keys(self, group: Group) -> Tensor:
        """Loss of keys coded after RoPE, at widths 0 .. n, [n + 1] float64."""
        return _tails(torch.linalg.eigvalsh(_block(self._keys, group, self._each.head_dim)))

    def folded_keys(self, group: Group) -> Tensor:
        """Loss of keys coded before RoPE, at widths 0 .. n, [n + 1] float64.

        Computed from codes of a few widths, up to the widest that an engine takes, and interpolated between
        them. An odd width loses as much as the even width below it, because cached numbers come in pairs.
        """
        distances, width_of_head = self._code_moments.distances, self._each.head_dim
        assert distances is not None
        n, samples = len(group) * width_of_head, list[tuple[int, float]]()
        energies, second = self._energies(group), _block(self._moments.key_second, group, self._each.head_dim)
        power = self._attention.scale**2
        even = {width_of_head, *(2 * round(n * share / 2) for share in _SAMPLED_SHARES)}
        for width in sorted(each for each in even - {0, n} if each <= WIDEST) or [n]:
            frequencies = frequencies_with_most(energies, width)
            problem = Folding(self._weights[list(group)], second, frequencies, distances)
            samples = samples or [(0, power * problem.power)]
            samples.append((width, power * problem.loss(problem.code(_ROUNDS))))
        return _interpolate(samples, n)

    def estimate(self, before_rotation: bool, group: Group) -> Tensor:
        """Loss of keys at widths 0 .. n from one eigenvalue problem, [n + 1] float64.

        Exact for codes after RoPE. For codes before RoPE, the loss of those that commute with rotation, which
        lose a few times more than the codes of `folded_keys`: accurate enough to compare groups.
        """
        if not before_rotation:
            return self.keys(group)
        energies = self._attention.scale**2 * self._energies(group)
        lost = _tails(energies.flatten().sort().values).repeat_interleave(2)[:-1]
        lost[self._each.head_dim] = energies[:, 1:].sum()  # at this width each frequency is cached once
        return lost

    def _energies(self, group: Group) -> Tensor:
        return mix_energies(
            self._weights[list(group)], _block(self._moments.key_second, group, self._each.head_dim)
        )


def _block(matrix: Tensor, group: Group, width: int) -> Tensor:
    """Rows and columns of the heads of a group, each of some width, in a matrix [h·d, h·d], [n, n]."""
    inside, heads = list(group), len(matrix) // width
    return matrix.view(heads, width, heads, width)[inside][:, :, inside].reshape(len(group) * width, -1)


def _root(covariance: Tensor) -> Tensor:
    """R with R Rᵀ = covariance, [n, n]."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return factor
    values, vectors = torch.linalg.eigh(covariance)  # singular, and several times as slow
    return vectors * values.clamp_min(0).sqrt()


def _tails(ascending: Tensor) -> Tensor:
    """Sums of all but the r largest of n eigenvalues, for r = 0 .. n, [n + 1]."""
    return torch.cat((ascending.new_zeros(1), ascending.clamp_min(0).cumsum(0))).flip(0)


def _interpolate(samples: Sequence[tuple[int, float]], n: int) -> Tensor:
    """Losses at widths 0 .. n, [n + 1], from (even width, loss) in ascending order, width 0 first.

    Geometric between the samples, linear to 0 beyond the last one.
    """
    widths, losses = np.array([width for width, _ in samples]), np.array([loss for _, loss in samples])
    least = max(float(losses.max()), _TINY) * _TINY
    losses = np.minimum.accumulate(np.maximum(losses, least))  # a wider code can do what a narrower one does
    even = np.arange(0, n + 1, 2)
    curve = np.exp(np.interp(even, widths, np.log(losses)))
    last = int(widths[-1])
    beyond = even > last
    curve[beyond] = losses[-1] * (n - even[beyond]) / max(n - last, 1)
    return torch.from_numpy(curve).repeat_interleave(2)[: n + 1]
