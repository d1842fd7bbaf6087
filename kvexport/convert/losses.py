"""What a set of heads loses when it shares one head of any width, from a layer's moments: one eigenvalue problem a side.

Losses are powers of the error of the attention output, E|Δo|², as `kvexport.convert.predict` defines them, so that those
of keys, values and groups add up. Knows the codes' theory; makes no code.
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

_ASKED = (
    1 / 32,
    1 / 16,
    1 / 8,
    3 / 16,
    1 / 4,
    3 / 8,
    1 / 2,
    3 / 4,
)  # of a group, widths whose codes before rotation are made
_TINY = 1e-12


class LayerLosses:
    """The losses of one unconverted layer's heads."""

    def __init__(self, code_moments: CodeMoments, attention: Attention) -> None:
        self._met, self._attention = code_moments, attention
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
        """Of online keys at widths 0 to n = heads·head_dim, [n + 1]."""
        inside = list(group)
        chosen = self._keys[inside][:, :, inside]
        return _tails(torch.linalg.eigvalsh(chosen.reshape(len(group) * chosen.shape[1], -1)))

    def values(self, group: Group) -> Tensor:
        """Of values at widths 0 to n, [n + 1]."""
        moments, attention, alone = self._alone(group)
        values, vectors = torch.linalg.eigh(moments.value_covariance(alone.rows(0)))
        root = vectors * values.clamp_min(0).sqrt()
        return _tails(torch.linalg.eigvalsh(root.T @ output_weights(moments, attention, alone, 0) @ root))

    def folded_keys(self, group: Group) -> Tensor:
        """Of keys in codes made before rotation, at widths 0 to n, [n + 1].

        Codes of a few widths are made and asked; between those, losses are interpolated. An odd width loses what the even one
        below does.
        """
        assert self._met.distances is not None
        moments, attention, alone = self._alone(group)
        n, found = alone.size * alone.head_dim, list[tuple[int, float]]()
        for width in sorted({alone.head_dim, *(2 * round(n * share / 2) for share in _ASKED)} - {0, n}) or [
            n
        ]:
            problem = folding(
                moments, alone, 0, cached_frequencies(moments, alone, width), self._met.distances
            )
            found = found or [(0, attention.scale**2 * problem.power)]
            found.append((width, attention.scale**2 * problem.loss(problem.code())))
        return _between(found, n)

    def estimate(self, before_rotation: bool, group: Group) -> Tensor:
        """Of keys at widths 0 to n, [n + 1], in one eigenvalue problem: exact for codes after rotation.

        For codes before it, of those that hold at every distance alike, which lose a few times more: enough to tell groups
        apart.
        """
        if not before_rotation:
            return self.keys(group)
        moments, attention, alone = self._alone(group)
        energies = attention.scale**2 * group_energies(moments, alone, 0)
        lost = _tails(energies.flatten().sort().values).repeat_interleave(2)[:-1]
        lost[attention.head_dim] = energies[:, 1:].sum()  # there each frequency is cached once
        return lost

    def _alone(self, group: Group) -> tuple[Moments, Attention, Grouping]:
        """The group as if it were first in the layer."""
        others = [head for head in range(self._attention.num_kv_heads) if head not in group]
        order = [*group, *others]
        attention = self._attention
        alone = Grouping(1, len(group), attention.queries_per_kv_head, attention.head_dim)
        return permute_moments(self._met.moments, order), permute_heads(attention, order), alone


def _tails(ascending: Tensor) -> Tensor:
    """Sums of all but the r largest eigenvalues, r = 0 .. n, [n + 1]."""
    return torch.cat((ascending.new_zeros(1), ascending.clamp_min(0).cumsum(0))).flip(0)


def _between(known: Sequence[tuple[int, float]], n: int) -> Tensor:
    """Losses at widths 0 to n, [n + 1], from those of some even widths, 0 the first: geometric between, then straight to 0."""
    widths, losses = np.array([width for width, _ in known]), np.array([loss for _, loss in known])
    least = max(float(losses.max()), _TINY) * _TINY
    losses = np.minimum.accumulate(
        np.maximum(losses, least)
    )  # a wider code is made from a narrower one, and loses no more
    even = np.arange(0, n + 1, 2)
    found = np.exp(np.interp(even, widths, np.log(losses)))
    last = int(widths[-1])
    beyond = even > last
    found[beyond] = losses[-1] * (n - even[beyond]) / max(n - last, 1)
    return torch.from_numpy(found).repeat_interleave(2)[: n + 1]
