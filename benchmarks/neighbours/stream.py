"""The residual stream of calibration windows, and the second moments that the neighbours are made from.

Knows how windows pass through one layer after another, in the memory of one layer's moments; must not know
what any method does with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvexport.calibrate import windows as attention_windows
from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer, Linear

Attend = Callable[[Tensor], Tensor]
"""Normed inputs [B, S, hidden] at positions 0 .. S - 1 to the attention output [B, S, hidden]."""


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
        self.x = reference.embed(decoder.embedding, windows)

    @torch.no_grad()
    def measure(self, layer: Layer) -> LayerMoments:
        """The moments of the layer's input and of its rotated keys and queries."""
        attention = layer.attention
        heads, width, hidden = attention.num_kv_heads, attention.head_dim, self.x.shape[-1]
        inputs = torch.zeros(hidden + 1, hidden + 1, dtype=torch.float64)
        keys, queries = (torch.zeros(heads, width, width, dtype=torch.float64) for _ in range(2))
        for batch in attention_windows.batches(range(len(self.x)), self.x.shape[1]):
            x = reference.normed(layer.attention_norm, self.x[batch])
            rows = x.double().flatten(0, 1)
            rows = torch.cat((rows, rows.new_ones(len(rows), 1)), dim=1)
            inputs += rows.T @ rows
            projected = attention_windows.project(attention, x)
            for total, each in ((keys, projected.key_rotated), (queries, projected.query_rotated)):
                stacked = each.double().transpose(0, 1).flatten(1, 2).unflatten(0, (heads, -1)).flatten(1, 2)
                total += stacked.transpose(1, 2) @ stacked
        tokens = self.x.shape[0] * self.x.shape[1]
        return LayerMoments(inputs / tokens, keys / tokens, queries / tokens)

    @torch.no_grad()
    def advance(self, layer: Layer, attend: Attend | None = None) -> None:
        """Take the stream past the layer in place, with `attend` for its attention if that is given."""
        attend = attend or partial(attention_windows.attend, layer.attention)
        for batch in attention_windows.batches(range(len(self.x)), self.x.shape[1]):
            self.x[batch] = reference.run_block(layer, self.x[batch], attend).residual
