"""Attention over whole windows of tokens with bounded memory for attention scores.

Scores are the largest tensors of calibration. Several windows form a batch while their scores fit into
`SCORES`; a window that is too long for it is computed in blocks of query rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from kvexport.model import reference
from kvexport.model.decoder import Attention, Layer
from kvexport.model.reference import Projected

SCORES = 1 << 20  # attention scores in memory at once, unless a single row of one window has more


def batches(windows: range, length: int, heads: int) -> Iterator[slice]:
    """Slices of `windows` whose scores fit into `SCORES`, at least one window each."""
    size = max(1, SCORES // (heads * length * length))
    return (slice(at, min(at + size, windows.stop)) for at in range(windows.start, windows.stop, size))


def project(attention: Attention, x: Tensor) -> Projected:
    """Queries, keys and values of normed inputs [B, S, hidden] at positions 0 .. S - 1."""
    return reference.project(attention, x, torch.arange(x.shape[1], device=x.device)[None])


def attend(attention: Attention, x: Tensor) -> Tensor:
    """The attention's output [B, S, hidden] of normed inputs of the same shape at positions 0 .. S - 1."""
    return reference.linear(attention.o, head_outputs(attention, project(attention, x)))


def head_outputs(
    attention: Attention,
    projected: Projected,
    inspect: Callable[[Tensor, Tensor], None] = lambda probabilities, value: None,
) -> Tensor:
    """Concatenated head outputs before `o`, [B, S, H·width], as `reference.head_outputs` computes them.

    Args:
        attention: the layer's attention.
        projected: its queries, keys and values on whole windows.
        inspect: called for each block of query rows with probabilities [B, H, M, N] and the values
            [B, Hkv, N, value_dim] of the first N positions, which include all that these rows can see.
    """
    query, key = (
        reference.map_queries(attention, projected.query_rotated),
        reference.map_keys(attention, projected.key_rotated),
    )
    windows, heads, length = query.shape[:3]
    positions = _positions(projected.value[:, 0])
    size = max(1, SCORES // (windows * heads * length))
    mixed = []
    for start in range(0, length, size):
        rows, visible = slice(start, start + size), slice(0, min(start + size, length))
        bias = reference.visibility(attention, positions[:, rows], positions[0, visible], query.dtype)
        probabilities = reference.weights(
            reference.scores(attention, query[:, :, rows], key[:, :, visible]) + bias
        )
        value = projected.value[:, :, visible]
        inspect(probabilities, value)
        mixed.append(reference.mix(attention, probabilities, value))
    return torch.cat(mixed, dim=1)


def advance(layer: Layer, x: Tensor) -> None:
    """Advance residual streams x [N, S, hidden] past a layer, in place."""
    for batch in batches(range(len(x)), x.shape[1], layer.attention.num_heads):
        x[batch] = reference.run_block(layer, x[batch], partial(attend, layer.attention)).residual


def _positions(x: Tensor) -> Tensor:  # [B, S, ...] -> [B, S]
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
