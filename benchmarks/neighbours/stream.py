"""The residual stream of calibration windows, and the second moments that the neighbours are made from.

Knows how windows pass through one layer after another, in the memory of one layer's moments; must not know
what any method does with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvexport.model import reference
from kvexport.model.decoder import Attention, Decoder, Layer, Linear, Rope

_SCORES = 1 << 21  # attention scores held at once, unless a single window has more

Attend = Callable[[Tensor, Tensor, "Rope | None"], Tensor]
"""Normed inputs [B, S, hidden], positions [B, S] and the rotary table to the attention output [B, S,
hidden]."""


def attend_with(attention: Attention) -> Attend:
    """The reference's own attention."""

    def attend(x: Tensor, positions: Tensor, rope: Rope | None) -> Tensor:
        return reference.linear(attention.o, reference.head_outputs(attention, x, positions, rope)[0])

    return attend


@dataclass(frozen=True)
class LayerMoments:
    """Means over calibration tokens, float64. h KV heads, d = head_dim."""

    inputs: Tensor  # [hidden + 1, hidden + 1], E[x xᵀ] of the normed input with a one appended
    keys: Tensor  # [h, d, d], E[k kᵀ], as they meet the queries: normalised, with bias, rotated
    queries: Tensor  # [h, d, d], E[q qᵀ] of the same kind, summed over the query heads of a KV head

    @property
    def second(self) -> Tensor:
        """E[x xᵀ] without the one, [hidden, hidden]."""
        return self.inputs[:-1, :-1]

    def outputs(self, linear: Linear) -> Tensor:
        """E[y yᵀ] of a projection's outputs y, bias included, before any norm or rotation: [out, out]."""
        weight = augmented(linear)
        return weight @ self.inputs @ weight.T

    def means(self, linear: Linear) -> Tensor:
        """E[y], [out]."""
        return augmented(linear) @ self.inputs[-1]


def augmented(linear: Linear) -> Tensor:
    """[W b], float64 [out, in + 1]; b = 0 without a bias."""
    bias = linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias
    return torch.cat((linear.weight, bias[:, None]), dim=1).double()


class Stream:
    """The residual stream x [N, S, hidden] of windows [N, S], taken past one layer after another."""

    @torch.no_grad()
    def __init__(self, decoder: Decoder, windows: Tensor) -> None:
        self.rope = decoder.rope
        self.x = reference.embed(decoder.embedding, windows)

    @torch.no_grad()
    def measure(self, layer: Layer) -> LayerMoments:
        """The moments of the layer's input and of its rotated keys and queries."""
        attention = layer.attention
        heads, width, hidden = attention.num_kv_heads, attention.head_dim, self.x.shape[-1]
        inputs = torch.zeros(hidden + 1, hidden + 1, dtype=torch.float64)
        keys, queries = (torch.zeros(heads, width, width, dtype=torch.float64) for _ in range(2))
        for batch in self._batches(attention):
            x = reference.norm(layer.attention_norm, self.x[batch])
            rows = x.double().flatten(0, 1)
            rows = torch.cat((rows, rows.new_ones(len(rows), 1)), dim=1)
            inputs += rows.T @ rows
            tables = (
                None if self.rope is None else reference.rotary_tables(self.rope, positions_of(x), x.dtype)
            )
            projected = reference.project(attention, x, tables)
            for total, each in ((keys, projected.key_rotated), (queries, projected.query_rotated)):
                stacked = each.double().transpose(0, 1).flatten(1, 2).unflatten(0, (heads, -1)).flatten(1, 2)
                total += stacked.transpose(1, 2) @ stacked
        tokens = self.x.shape[0] * self.x.shape[1]
        return LayerMoments(inputs / tokens, keys / tokens, queries / tokens)

    @torch.no_grad()
    def advance(self, layer: Layer, attend: Attend | None = None) -> None:
        """Take the stream past the layer in place, with `attend` for its attention if that is given."""
        attend = attend or attend_with(layer.attention)
        for batch in self._batches(layer.attention):
            x = self.x[batch]
            normed = reference.norm(layer.attention_norm, x)
            x += attend(normed, positions_of(x), self.rope)
            x += reference.mlp(layer.mlp, reference.norm(layer.mlp_norm, x))

    def _batches(self, attention: Attention) -> Iterator[slice]:
        count, length = self.x.shape[:2]
        size = max(1, _SCORES // (attention.num_heads * length * length))
        return (slice(at, at + size) for at in range(0, count, size))


def positions_of(x: Tensor) -> Tensor:
    """0..S-1 for each row of [B, S, ...]."""
    return torch.arange(x.shape[1]).expand(x.shape[:2])
