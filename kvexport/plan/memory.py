"""Memory: the bytes that a model of given sizes takes on a device, and the longest context that fits."""

from __future__ import annotations

from dataclasses import dataclass

from kvexport.bundle.formats import BYTES
from kvexport.eviction.config import STATE_WIDTH
from kvexport.plan.sizes import Sizes

_GIB = 2**30
_SLOT_BYTES = STATE_WIDTH * BYTES["float32"]  # eviction state of one token in one KV head
# CUDA's context with TensorRT's libraries: a common value, not a published one. ONNX Runtime on a CPU needs
# less.
_ENGINE_BYTES = {"tensorrt": _GIB // 2, "tensorrt-rtx": _GIB // 2, "onnxruntime": _GIB // 8}


@dataclass(frozen=True)
class Precision:
    """How weights are stored.

    Attributes:
        name: one of `PRECISIONS`.
        bits: bits of a number in the layers' matrices.
        group: inputs that share a scale (int4); 0: one scale for each output row (int8), or no scales.
        other: bytes of all other numbers: embedding, head, norms, maps, cache and activations.
    """

    name: str
    bits: int
    group: int
    other: int

    def matrix_bytes(self, sizes: Sizes) -> int:
        """Bytes of the layers' matrices and their scales."""
        scales = 0
        if self.bits < 16:
            scales = sizes.matrices // self.group if self.group else sizes.rows
        return sizes.matrices * self.bits // 8 + scales * self.other


PRECISIONS = ("float32", "float16", "bfloat16", "int8", "int4")


def precision(name: str, engine: str) -> Precision:
    """A precision on `engine`: with weights of 8 or 4 bits, ONNX Runtime on a CPU keeps the rest in
    float32."""
    bits, group = {
        "float32": (32, 0),
        "float16": (16, 0),
        "bfloat16": (16, 0),
        "int8": (8, 0),
        "int4": (4, 128),
    }[name]
    wide = bits == 32 or (bits < 16 and engine == "onnxruntime")
    return Precision(name, bits, group, 4 if wide else 2)


@dataclass(frozen=True)
class Memory:
    """Bytes that a model takes with a cache of `context` tokens at batch 1; `kv_state` is part of `kv`.

    Weights are counted once. Measured with tensorrt-rtx 1.7.1: a plan has them once too, including a tied
    embedding, if no profile fixes every shape. A decode profile of exactly one token beside a prefill profile
    doubles the matrices.
    """

    context: int
    weights: int
    kv: int
    kv_state: int
    activations: int
    engine: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.activations + self.engine


def weight_bytes(sizes: Sizes, stored: Precision) -> int:
    """Bytes of all weights; a tied embedding counts once."""
    return stored.matrix_bytes(sizes) + (sizes.small + sizes.embedding + sizes.head) * stored.other


def kv_bytes_per_token(sizes: Sizes, stored: Precision) -> int:
    """Bytes of a token's keys and values in all layers, without eviction."""
    return sizes.kv_width * stored.other


def kv_bytes(sizes: Sizes, stored: Precision, tokens: int) -> int:
    """Bytes of the cache of a sequence of `tokens` tokens, including the eviction state."""
    numbers = sum(
        sizes.cached_tokens(layer, tokens) * cache.heads * cache.width
        for layer, cache in enumerate(sizes.caches)
    )
    return numbers * stored.other + state_bytes(sizes, tokens)


def state_bytes(sizes: Sizes, tokens: int) -> int:
    """Bytes of the eviction state in it: the score and the position of each slot of each KV head."""
    caches = [(layer, cache) for layer, cache in enumerate(sizes.caches) if sizes.evicts(layer)]
    return sum(sizes.cached_tokens(layer, tokens) * cache.heads * _SLOT_BYTES for layer, cache in caches)


def memory(
    sizes: Sizes, stored: Precision, context: int, *, engine: str, lowering: str, chunk: int | None = None
) -> Memory:
    """The memory for a sequence of `context` tokens, with prompts computed in chunks of `chunk` tokens.

    Activations are an estimate: the residual stream and the widest part of one layer for a chunk, the logits
    of one token, and attention of a chunk over all slots of the layer that needs most. Attention needs a mask
    if the engine has a fused kernel, one mask for each KV head if the layer evicts, and every head's scores
    with their softmax if there is no fused kernel ("decomposed17").

    Args:
        chunk: None: the chunk of the runtime.
    """
    tokens = min(sizes.chunk if chunk is None else chunk, context)
    attention = max((sizes.num_heads + cache.heads) * cache.width for cache in sizes.caches)
    wide = 2 * sizes.hidden + max(sizes.mlp_width, attention)

    def scores(layer: int) -> int:
        if lowering == "decomposed17":
            return 2 * sizes.num_heads
        return sizes.caches[layer].heads if sizes.evicts(layer) else 1

    widest = max(scores(layer) * sizes.cached_tokens(layer, context) for layer in range(sizes.layers))
    return Memory(
        context=context,
        weights=weight_bytes(sizes, stored),
        kv=kv_bytes(sizes, stored, context),
        kv_state=state_bytes(sizes, context),
        activations=(tokens * (wide + widest)) * stored.other + 4 * sizes.vocab,
        engine=_ENGINE_BYTES[engine],
    )


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
