"""What a set of heads loses when it shares one head of any width, from a layer's moments: one eigenvalue problem a side.

Losses are powers of the error of the attention output, E|Δo|², as `kvexport.convert.predict` defines them, so that those
of keys, values and groups add up. Knows the codes' theory; makes no code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvexport.calibrate import Moments
from kvexport.convert.commuting import mix_energies
from kvexport.convert.groups import Grouping
from kvexport.convert.keys import member_weights, query_weights
from kvexport.convert.matching import Group
from kvexport.convert.permute import permuted, permuted_moments
from kvexport.convert.values import output_weights
from kvexport.decoder import Attention


class LayerLosses:
    """The losses of one unconverted layer's heads."""

    def __init__(self, moments: Moments, attention: Attention) -> None:
        self._moments, self._attention = moments, attention
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

    def of_keys(self, commuting: bool, group: Group) -> Tensor:
        """Of keys, in codes that commute with RoPE or in others."""
        return self.folded_keys(group) if commuting else self.keys(group)

    def folded_keys(self, group: Group) -> Tensor:
        """Of keys in codes that commute with RoPE, at widths 0 to n, [n + 1]; an odd width loses what the even one below does.

        With phases averaged, in which frequencies do not meet: codes are then made better than that, by least squares.
        """
        moments, attention, alone = self._alone(group)
        energies = attention.scale**2 * mix_energies(moments, member_weights(moments, alone, 0), alone, 0)
        lost = _tails(energies.flatten().sort().values).repeat_interleave(2)[:-1]
        lost[attention.head_dim] = energies[:, 1:].sum()  # there each frequency is cached once
        return lost

    def _alone(self, group: Group) -> tuple[Moments, Attention, Grouping]:
        """The group as if it were first in the layer."""
        others = [head for head in range(self._attention.num_kv_heads) if head not in group]
        order = [*group, *others]
        attention = self._attention
        alone = Grouping(1, len(group), attention.queries_per_kv_head, attention.head_dim)
        return permuted_moments(self._moments, order), permuted(attention, order), alone


def _tails(ascending: Tensor) -> Tensor:
    """Sums of all but the r largest eigenvalues, r = 0 .. n, [n + 1]."""
    return torch.cat((ascending.new_zeros(1), ascending.clamp_min(0).cumsum(0))).flip(0)
