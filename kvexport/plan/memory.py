"""Bytes: what a model of given sizes takes on a device, and how long a context fits.

Knows how wide each number is stored and what an engine holds besides weights and cache; must not know time.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvexport.bundle.manifest import BYTES
from kvexport.eviction.config import STATE_WIDTH
from kvexport.plan.sizes import Sizes

_GIB = 2**30
# CUDA's context with TensorRT's libraries: commonly seen, published by nobody. ONNX Runtime on a CPU needs less.
_SLOT_BYTES = (
    STATE_WIDTH * BYTES["float32"]
)  # of the state that each KV head of a layer that evicts keeps of a token
_ENGINE_BYTES = {"tensorrt": _GIB // 2, "tensorrt-rtx": _GIB // 2, "onnxruntime": _GIB // 8}


@dataclass(frozen=True)
class Precision:
    """How weights are stored.

    Attributes:
        bits: of a number in the layers' matrices.
        group: inputs that share a scale (int4); 0: a scale for each output row (int8), or none.
        other: bytes of every other number: embedding, head, norms, maps, cache and activations.
    """

    name: str
    bits: int
    group: int
    other: int

    def matrix_bytes(self, sizes: Sizes) -> int:
        """Bytes of the layers' matrices with their scales."""
        scales = 0
        if self.bits < 16:
            scales = sizes.matrices // self.group if self.group else sizes.rows
        return sizes.matrices * self.bits // 8 + scales * self.other


PRECISIONS = ("float32", "float16", "bfloat16", "int8", "int4")


def precision(name: str, engine: str) -> Precision:
    """A precision as `engine` runs it: with weights of 8 or 4 bits, ONNX Runtime on a CPU keeps the rest in float32."""
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
    """Bytes that a model takes with a cache of `context` tokens, batch 1; `kv_state` is part of `kv`.

    Weights are counted once. Tried with tensorrt-rtx 1.7.1: so does a plan, of a tied embedding too, as long as no
    profile fixes every shape; a decode profile of exactly one token beside one for prefill doubles the matrices.
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
    """Bytes of all weights, a tied embedding once."""
    return stored.matrix_bytes(sizes) + (sizes.small + sizes.embedding + sizes.head) * stored.other


def kv_bytes_per_token(sizes: Sizes, stored: Precision) -> int:
    """Bytes that a token adds to the cache while no layer evicts; keys and values alone."""
    return sizes.kv_width * stored.other


def kv_bytes(sizes: Sizes, stored: Precision, tokens: int) -> int:
    """Bytes of the cache of a sequence of so many tokens, with the state of each slot where layers evict."""
    numbers = sum(
        sizes.held(layer, tokens) * cache.heads * cache.width for layer, cache in enumerate(sizes.caches)
    )
    return numbers * stored.other + state_bytes(sizes, tokens)


def state_bytes(sizes: Sizes, tokens: int) -> int:
    """Of those, the state's: what each slot of each KV head is ranked by, and its position."""
    caches = [(layer, cache) for layer, cache in enumerate(sizes.caches) if sizes.evicts(layer)]
    return sum(sizes.held(layer, tokens) * cache.heads * _SLOT_BYTES for layer, cache in caches)


def memory(
    sizes: Sizes, stored: Precision, context: int, *, engine: str, lowering: str, chunk: int | None = None
) -> Memory:
    """What a sequence of `context` tokens needs, its prompt computed `chunk` tokens at a time (None: as the runtime does).

    Activations are an estimate: the residual stream and what the widest part of one layer holds at once, for a chunk;
    the logits of one token; and what attention needs for a chunk against all slots of the layer that needs most. That is a
    mask where the engine has a fused kernel, one for each KV head where the layer evicts, and every head's scores with
    their softmax where it has none ("decomposed17").
    """
    tokens = min(sizes.chunk if chunk is None else chunk, context)
    attention = max((sizes.num_heads + cache.heads) * cache.width for cache in sizes.caches)
    wide = 2 * sizes.hidden + max(sizes.mlp_width, attention)

    def scores(layer: int) -> int:
        if lowering == "decomposed17":
            return 2 * sizes.num_heads
        return sizes.caches[layer].heads if sizes.evicts(layer) else 1

    seen = max(scores(layer) * sizes.held(layer, context) for layer in range(sizes.layers))
    return Memory(
        context=context,
        weights=weight_bytes(sizes, stored),
        kv=kv_bytes(sizes, stored, context),
        kv_state=state_bytes(sizes, context),
        activations=(tokens * (wide + seen)) * stored.other + 4 * sizes.vocab,
        engine=_ENGINE_BYTES[engine],
    )


def largest_context(sizes: Sizes, stored: Precision, budget: int, *, engine: str, lowering: str) -> int:
    """The most tokens whose memory is within `budget` bytes, no more than the model was trained for; 0: not one."""

    def fits(context: int) -> bool:
        return memory(sizes, stored, context, engine=engine, lowering=lowering).total <= budget

    least, most = 0, sizes.max_positions or max(1, budget // kv_bytes_per_token(sizes, stored))
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least
