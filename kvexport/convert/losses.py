"""What a set of heads loses when it shares one head of any width, from a layer's moments: one eigenvalue problem a side.

Losses are powers of the error of the attention output, E|Δo|², as `kvexport.convert.predict` defines them, so that those
of keys, values and groups add up. Knows the codes' theory; makes no code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvexport.calibrate import Moments
from kvexport.convert.groups import Grouping
from kvexport.convert.keys import cached_frequencies, fold, query_weights
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

    def folded_keys(self, group: Group, width: int) -> float:
        """Of keys in a code of that width that commutes with RoPE; the moments are `over_distances`."""
        moments, attention, alone = self._alone(group)
        residual = fold(moments, attention, alone, 0, width, cached_frequencies(moments, alone, width)).residual
        lost = residual @ moments.key_covariance(alone.rows(0)) @ residual.T
        return attention.scale**2 * float((query_weights(moments, alone, 0) * lost).sum())

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
