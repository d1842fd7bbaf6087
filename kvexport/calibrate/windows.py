"""Attention over whole windows of tokens with bounded memory.

Batches of windows are bounded by tokens. `head_outputs` runs fused attention, which keeps no scores; where
probabilities are needed, `probability_blocks` computes them in blocks that fit into `SCORES`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from kvexport.model import reference
from kvexport.model.decoder import Attention, Layer
from kvexport.model.placement import CPU
from kvexport.model.reference import Projected

TOKENS = 2048  # tokens of a batch, unless one window has more: enough for matrix products on several cores
SCORES = 1 << 19  # attention scores in memory at once, unless one row of one window has more; fits a cache
_ROWS = 64  # query rows of a block of scores: smaller blocks compute fewer scores of hidden keys
_MASK_ROWS = 256  # the same where attention is fused and has a mask


def batches(windows: range, length: int) -> Iterator[slice]:
    """Slices of `windows` that have at most `TOKENS` tokens, at least one window each."""
    size = max(1, TOKENS // length)
    return (slice(at, min(at + size, windows.stop)) for at in range(windows.start, windows.stop, size))


def project(attention: Attention, x: Tensor) -> Projected:
    """Queries, keys and values of normed inputs [B, S, hidden] at positions 0 .. S - 1."""
    return reference.project(attention, x, torch.arange(x.shape[1], device=x.device)[None])


def attend(attention: Attention, x: Tensor) -> Tensor:
    """The attention's output [B, S, hidden] of normed inputs of the same shape at positions 0 .. S - 1."""
    return reference.linear(attention.o, head_outputs(attention, project(attention, x)))


def head_outputs(attention: Attention, projected: Projected) -> Tensor:
    """Concatenated head outputs before `o`, [B, S, H·width], as `reference.head_outputs` computes them.

    Args:
        attention: the layer's attention.
        projected: its queries, keys and values on whole windows.
    """
    value = projected.value
    batch, _, length, width = value.shape
    mixed = value.new_empty(batch, length, attention.num_heads, width)
    if attention.softcap is None:
        _fused(attention, projected, mixed)
    else:  # fused attention has no softcap
        for block in probability_blocks(attention, projected):
            heads = block.probabilities @ value[block.windows, :, block.visible]
            heads = heads.unflatten(2, (attention.queries_per_kv_head, -1)).flatten(1, 2)  # [b, H, M, width]
            mixed[block.windows, block.rows] = heads.transpose(1, 2)
    if attention.value_map is not None:
        by_head = mixed.flatten(0, 1).transpose(0, 1)  # [H, B·S, value_dim]
        mixed = (by_head @ attention.value_map).transpose(0, 1).unflatten(0, mixed.shape[:2])
    return mixed.flatten(2)


def _fused(attention: Attention, projected: Projected, mixed: Tensor) -> None:
    """Write the head outputs before any value_map to `mixed` [B, S, H, value_dim].

    Keys and values are padded to one width: PyTorch's fused kernels take no others.
    """
    query, key = _mapped(attention, projected)
    width = max(key.shape[3], projected.value.shape[3])
    query, key, value = (F.pad(x, (0, width - x.shape[3])) for x in (query, key, projected.value))
    if query.device.type != CPU:  # of the fused kernels for CUDA, that for float32 takes no shared heads
        key, value = (x.repeat_interleave(attention.queries_per_kv_head, 1) for x in (key, value))
    run = partial(
        F.scaled_dot_product_attention,
        scale=attention.scale,
        enable_gqa=key.shape[1] != attention.num_heads,
    )
    length = query.shape[2]
    if attention.alibi_slopes is None and (attention.window is None or attention.window >= length):
        mixed.copy_(run(query, key, value, is_causal=True)[..., : mixed.shape[3]].transpose(1, 2))
        return
    biases = 1 if attention.alibi_slopes is None else attention.num_heads
    for rows, visible in _row_blocks(attention, length, min(_MASK_ROWS, SCORES // (biases * length))):
        bias = _bias(attention, rows, visible, query)
        heads = run(query[:, :, rows], key[:, :, visible], value[:, :, visible], attn_mask=bias)
        mixed[:, rows] = heads[..., : mixed.shape[3]].transpose(1, 2)


@dataclass(frozen=True)
class ProbabilityBlock:
    """Attention probabilities of M query rows of b windows.

    Attributes:
        windows: slice of the windows.
        rows: slice of the query rows.
        visible: slice of the N keys, which include all that these rows can see.
        probabilities: [b, Hkv, G·M, N]; the rows of the G query heads that share a cached head follow each
            other.
    """

    windows: slice
    rows: slice
    visible: slice
    probabilities: Tensor


def probability_blocks(attention: Attention, projected: Projected) -> Iterator[ProbabilityBlock]:
    """Attention probabilities of whole windows, in blocks of at most `SCORES`, in the dtype of the queries.

    A block's tensor may be overwritten.
    """
    query, key = _mapped(attention, projected)
    windows, heads, length = query.shape[:3]
    for rows, visible in _row_blocks(attention, length, min(_ROWS, SCORES // (heads * length))):
        bias = _bias(attention, rows, visible, query)
        span = rows.stop - rows.start
        size = max(1, SCORES // (heads * span * (visible.stop - visible.start)))
        for at in range(0, windows, size):
            each = slice(at, min(at + size, windows))
            scores = reference.scores(attention, query[each, :, rows], key[each, :, visible])
            probabilities = reference.weights(scores.add_(bias))
            yield ProbabilityBlock(
                each,
                rows,
                visible,
                probabilities.view(len(probabilities), attention.num_kv_heads, -1, probabilities.shape[3]),
            )


def _mapped(attention: Attention, projected: Projected) -> tuple[Tensor, Tensor]:
    """Queries and keys whose products are the scores."""
    return (
        reference.map_queries(attention, projected.query_rotated),
        reference.map_keys(attention, projected.key_rotated),
    )


def _row_blocks(attention: Attention, length: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Slices of `size` query rows, at least one, and of the keys that they can see."""
    for start in range(0, length, max(1, size)):
        stop = min(start + max(1, size), length)
        first = 0 if attention.window is None else max(0, start - attention.window + 1)
        yield slice(start, stop), slice(first, stop)


def _bias(attention: Attention, rows: slice, visible: slice, like: Tensor) -> Tensor:
    """`reference.visibility` of these rows and keys, [1, H or 1, M, N]."""
    positions, slots = (torch.arange(each.start, each.stop, device=like.device) for each in (rows, visible))
    return reference.visibility(attention, positions[None], slots, like.dtype)


def advance(layer: Layer, x: Tensor) -> None:
    """Advance residual streams x [N, S, hidden] past a layer, in place."""
    for batch in batches(range(len(x)), x.shape[1]):
        x[batch] = reference.run_block(layer, x[batch], partial(attend, layer.attention)).residual
