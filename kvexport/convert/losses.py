"""Loss of a group of KV heads at every width of the cached head, from a layer's moments.

A loss is the power of the error of the attention output, E|Δo|², by the same model as
`kvexport.convert.predict`; losses of keys, values and groups add. One eigenvalue problem per side gives the
losses at all widths; only keys coded before RoPE need codes made at a few widths. n = t·d below is the width
of the group's stack.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvexport.calibrate import Moments
from kvexport.convert.code_moments import CodeMoments
from kvexport.convert.groups import Grouping
from kvexport.convert.keys import cached_frequencies, folding, group_energies, query_weights
from kvexport.convert.matching import Group
from kvexport.convert.permute import permute_heads, permute_moments
from kvexport.convert.values import output_weights
from kvexport.model.decoder import Attention

# widths, as shares of n, at which codes before RoPE are made; losses between them are interpolated
_SAMPLED_SHARES = (1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
_TINY = 1e-12


class LayerLosses:
    """Losses of groups of one unconverted layer's KV heads."""

    def __init__(self, code_moments: CodeMoments, attention: Attention) -> None:
        """
        Args:
            code_moments: moments on the side of RoPE on which the method codes keys.
            attention: the unconverted layer.
        """
        self._code_moments, self._attention = code_moments, attention
        moments = code_moments.moments
        each = Grouping.of(attention, attention.num_kv_heads)
        roots = []
        for head in range(each.kv_heads):
            values, vectors = torch.linalg.eigh(query_weights(moments, each, head))
            roots.append(vectors * values.clamp_min(0).sqrt() @ vectors.T)
        root = torch.block_diag(*roots) * attention.scale
        everything = slice(0, each.kv_heads * each.head_dim)
        self._keys = (root @ moments.key_covariance(everything) @ root).view(
            each.kv_heads, each.head_dim, each.kv_heads, each.head_dim
        )

    def keys(self, group: Group) -> Tensor:
        """Loss of keys coded after RoPE, at widths 0 .. n, [n + 1] float64."""
        inside = list(group)
        chosen = self._keys[inside][:, :, inside]
        return _tails(torch.linalg.eigvalsh(chosen.reshape(len(group) * chosen.shape[1], -1)))

    def values(self, group: Group) -> Tensor:
        """Loss of values, at widths 0 .. n, [n + 1] float64."""
        moments, attention, alone = self._alone(group)
        values, vectors = torch.linalg.eigh(moments.value_covariance(alone.rows(0)))
        root = vectors * values.clamp_min(0).sqrt()
        return _tails(torch.linalg.eigvalsh(root.T @ output_weights(moments, attention, alone, 0) @ root))

    def folded_keys(self, group: Group) -> Tensor:
        """Loss of keys coded before RoPE, at widths 0 .. n, [n + 1] float64.

        Computed from codes of a few widths and interpolated between them. An odd width loses as much as the
        even width below it, because cached numbers come in pairs.
        """
        assert self._code_moments.distances is not None
        moments, attention, alone = self._alone(group)
        n, samples = alone.size * alone.head_dim, list[tuple[int, float]]()
        even = {alone.head_dim, *(2 * round(n * share / 2) for share in _SAMPLED_SHARES)}
        for width in sorted(even - {0, n}) or [n]:
            problem = folding(
                moments, alone, 0, cached_frequencies(moments, alone, width), self._code_moments.distances
            )
            samples = samples or [(0, attention.scale**2 * problem.power)]
            samples.append((width, attention.scale**2 * problem.loss(problem.code())))
        return _interpolate(samples, n)

    def estimate(self, before_rotation: bool, group: Group) -> Tensor:
        """Loss of keys at widths 0 .. n from one eigenvalue problem, [n + 1] float64.

        Exact for codes after RoPE. For codes before RoPE, the loss of those that commute with rotation, which
        lose a few times more than the codes of `folded_keys`: accurate enough to compare groups.
        """
        if not before_rotation:
            return self.keys(group)
        moments, attention, alone = self._alone(group)
        energies = attention.scale**2 * group_energies(moments, alone, 0)
        lost = _tails(energies.flatten().sort().values).repeat_interleave(2)[:-1]
        lost[attention.head_dim] = energies[:, 1:].sum()  # at this width each frequency is cached once
        return lost

    def _alone(self, group: Group) -> tuple[Moments, Attention, Grouping]:
        """The layer with the group's heads first, and a grouping of these heads alone."""
        others = [head for head in range(self._attention.num_kv_heads) if head not in group]
        order = [*group, *others]
        attention = self._attention
        alone = Grouping(1, len(group), attention.queries_per_kv_head, attention.head_dim)
        return permute_moments(self._code_moments.moments, order), permute_heads(attention, order), alone


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
