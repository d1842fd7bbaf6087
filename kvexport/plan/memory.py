"""Memory: the bytes that a model of given sizes takes on a device, and the longest context that fits.

The activation memory of TensorRT is what TensorRT-RTX 1.7.1 reports while it builds ("Total Activation
Memory"). The terms of `_activations` come from 39 builds in float16, int8 and int4 for compute capability
8.6: 1 to 8 layers, width 1024 and 2048, 4 to 32 query heads, 256 to 8192 slots, 32 to 256 tokens a call. What
it reports is 0.71 to 1.23 times what they give, and 0.90 to 1.07 times in all but three builds. Integer
weights, embedding and head add nothing: none is expanded. TensorRT on a Jetson may differ; it has not run.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvexport.bundle.formats import BYTES
from kvexport.eviction.config import STATE_WIDTH
from kvexport.plan.sizes import Sizes
from kvexport.plan.weights import Precision

_MIB = 2**20
_SLOT_BYTES = STATE_WIDTH * BYTES["float32"]  # eviction state of one token in one KV head
# CUDA's context and the libraries with their kernels: an assumption, neither published nor measured.
_ENGINE_BYTES = {"tensorrt": 512 * _MIB, "tensorrt-rtx": 512 * _MIB, "onnxruntime": 128 * _MIB}
_SCRATCH_BYTES = 8 * _MIB  # scratch memory of TensorRT's kernels
_LOGITS_ARRAYS = {"tensorrt": 4, "tensorrt-rtx": 4}  # of decode and prefill, on the device and on the host


@dataclass(frozen=True)
class Memory:
    """Bytes that a model takes with a cache of `context` tokens at batch 1.

    Weights are counted once. Measured with tensorrt-rtx 1.7.1: a plan has them once too, including a tied
    embedding, if no profile fixes every shape. A decode profile of exactly one token beside a prefill profile
    doubles the matrices.

    Attributes:
        context: tokens.
        weights: as the bundle stores them.
        kv: the cache.
        kv_state: eviction state, which is part of `kv`.
        activations: temporary values of a call, for the longest call.
        io: logits, and the new keys and values where the engine does not write the cache itself.
        engine: CUDA's context and the engine's libraries.
    """

    context: int
    weights: int
    kv: int
    kv_state: int
    activations: int
    io: int
    engine: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.activations + self.io + self.engine


def kv_bytes_per_token(sizes: Sizes, stored: Precision) -> int:
    """Bytes of a token's keys and values in all layers, without eviction."""
    return sizes.kv_width * stored.number_bytes


def kv_bytes(sizes: Sizes, stored: Precision, tokens: int) -> int:
    """Bytes of the cache of a sequence of `tokens` tokens, including the eviction state."""
    numbers = sum(
        sizes.cached_tokens(layer, tokens) * cache.heads * cache.width
        for layer, cache in enumerate(sizes.caches)
    )
    return numbers * stored.number_bytes + state_bytes(sizes, tokens)


def state_bytes(sizes: Sizes, tokens: int) -> int:
    """Bytes of the eviction state in it: the score and the position of each slot of each KV head."""
    caches = [(layer, cache) for layer, cache in enumerate(sizes.caches) if sizes.evicts(layer)]
    return sum(sizes.cached_tokens(layer, tokens) * cache.heads * _SLOT_BYTES for layer, cache in caches)


def memory(
    sizes: Sizes, stored: Precision, context: int, *, engine: str, lowering: str, chunk: int | None = None
) -> Memory:
    """The memory for a sequence of `context` tokens, with prompts computed in chunks of `chunk` tokens.

    Args:
        chunk: None: the chunk of the runtime.
    """
    tokens = min(sizes.chunk if chunk is None else chunk, context)
    new_tokens = tokens * kv_bytes_per_token(sizes, stored) if lowering == "decomposed17" else 0
    return Memory(
        context=context,
        weights=sizes.weight_bytes(stored).total,
        kv=kv_bytes(sizes, stored, context),
        kv_state=state_bytes(sizes, context),
        activations=_activations(sizes, stored, context, tokens, engine, lowering),
        io=_LOGITS_ARRAYS.get(engine, 1) * sizes.vocab * BYTES["float32"] + new_tokens,
        engine=_ENGINE_BYTES[engine],
    )


def _activations(
    sizes: Sizes, stored: Precision, context: int, tokens: int, engine: str, lowering: str
) -> int:
    """Bytes of the temporary values of a call of `tokens` tokens, for `context` slots.

    - Of each token: the residual stream, the widest part of a layer, and attention over the slots of the
      layer that needs most: a mask if the engine has a fused kernel, one for each KV head if the layer
      evicts, and every head's scores with their softmax in "decomposed17".
    - With TensorRT, scratch memory, and copies of the cache. Fused attention copies keys and values of one
      layer, expanded to the query heads. "decomposed17" copies half of the whole cache.
    """
    slots = [sizes.cached_tokens(layer, context) for layer in range(sizes.layers)]
    attention = max((sizes.num_heads + cache.heads) * cache.width for cache in sizes.caches)
    wide = 2 * sizes.hidden + max(sizes.mlp_width, attention)
    rows = max(count * _score_rows(sizes, layer, lowering) for layer, count in enumerate(slots))
    of_tokens = tokens * (wide + rows) * stored.number_bytes
    if engine == "onnxruntime":
        return of_tokens
    if lowering == "decomposed17":
        keys = sum(
            count * cache.heads * cache.width // 2 for count, cache in zip(slots, sizes.caches, strict=True)
        )
        return of_tokens + keys * stored.number_bytes + _SCRATCH_BYTES
    expanded = max(
        count * sizes.num_heads * cache.width // 2 for count, cache in zip(slots, sizes.caches, strict=True)
    )
    copy = expanded * stored.number_bytes
    return of_tokens + copy + max(copy, _SCRATCH_BYTES)


def _score_rows(sizes: Sizes, layer: int, lowering: str) -> int:
    """Numbers that attention of a token takes for each slot."""
    if lowering == "decomposed17":
        return 2 * sizes.num_heads
    return sizes.caches[layer].heads if sizes.evicts(layer) else 1


def largest_context(sizes: Sizes, stored: Precision, budget: int, *, engine: str, lowering: str) -> int:
    """The longest context whose memory is within `budget` bytes, at most what the model was trained for; 0:
    none."""

    def fits(context: int) -> bool:
        return memory(sizes, stored, context, engine=engine, lowering=lowering).total <= budget

    low, high = 0, sizes.max_positions or max(1, budget // kv_bytes_per_token(sizes, stored))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
