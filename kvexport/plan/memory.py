"""Memory: the bytes that a model of given sizes takes on a device, and the longest context that fits."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from kvexport.bundle.formats import BYTES, INTEGERS, default_block, weight_format
from kvexport.bundle.manifest import Manifest
from kvexport.eviction.config import STATE_WIDTH
from kvexport.plan.sizes import Sizes

_GIB, _PAGE = 2**30, 4096
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
        group: inputs that share a scale (int4); 0: one scale for each output row (int8), or no scales; None:
            as `kvexport build` chooses.
        other: bytes of all other numbers: norms, maps, cache and activations.
        embedding, head: names of the formats of the two tables; None: as all other numbers.
    """

    name: str
    bits: int
    group: int | None
    other: int
    embedding: str | None = None
    head: str | None = None

    def matrix_bytes(self, sizes: Sizes) -> int:
        """Bytes of the layers' matrices and their scales."""
        scales = 0
        if self.bits < 16 and sizes.shapes:
            block = self.group or default_block(sizes.hidden)
            return sum(
                count * self._integer_bytes(self.name, rows, columns, block)
                for (rows, columns), count in sizes.shapes.items()
            )
        if self.bits < 16:
            scales = sizes.matrices // self.group if self.group else sizes.rows
        return sizes.matrices * self.bits // 8 + scales * self.other

    def embedding_bytes(self, sizes: Sizes) -> int:
        """Bytes of the embedding with its scales; of the tied head, too."""
        return self._table_bytes(self.embedding, sizes.vocab + sizes.vocab % 2, sizes.embedding, sizes)

    def head_bytes(self, sizes: Sizes) -> int:
        """Bytes of the head with its scales; 0 if it is tied to the embedding."""
        return self._table_bytes(self.head, sizes.vocab, sizes.head, sizes)

    def _table_bytes(self, name: str | None, rows: int, numbers: int, sizes: Sizes) -> int:
        if name not in INTEGERS or numbers == 0:
            return numbers * self.other
        columns = numbers // sizes.vocab
        stored = self._integer_bytes(name, rows, columns, default_block(sizes.hidden))
        return stored * sizes.vocab // rows

    def _integer_bytes(self, name: str, rows: int, columns: int, block: int) -> int:
        chosen = weight_format(name, rows, columns, block)
        dtype = "float32" if self.other == BYTES["float32"] else "float16"
        data, scales = chosen.data_bytes(rows, columns), chosen.scale_bytes(rows, columns, dtype)
        if scales < _PAGE:
            return _in_pages(data + scales)
        return _in_pages(data) + _in_pages(scales)


def _in_pages(size: int) -> int:
    """Bytes that a tensor takes in the file: tensors begin at a page."""
    return -(-size // _PAGE) * _PAGE


PRECISIONS = ("float32", "float16", "bfloat16", "int8", "int4")


def precision(name: str, engine: str, *, tables: str | None = None) -> Precision:
    """A precision on `engine`: with weights of 8 or 4 bits, ONNX Runtime on a CPU keeps the rest in
    float32.

    Args:
        name: one of `PRECISIONS`.
        engine: "tensorrt", "tensorrt-rtx" or "onnxruntime".
        tables: name of the format of embedding and head in a bundle; None: they are as all other numbers, and
            int4 has groups of 128, as in other runtimes.
    """
    bits, group = {
        "float32": (32, 0),
        "float16": (16, 0),
        "bfloat16": (16, 0),
        "int8": (8, 0),
        "int4": (4, 128),
    }[name]
    wide = bits == 32 or (bits < 16 and engine == "onnxruntime")
    block = None if tables is not None and bits == 4 else group
    return Precision(name, bits, block, 4 if wide else 2, tables, tables)


def bundle_precision(manifest: Manifest, engine: str) -> Precision:
    """The precision of a bundle; that of most weights of its layers if they differ."""
    weights = manifest.weights
    totals: Counter[str] = Counter()
    for share in (share for layer in weights.layers for share in layer):
        totals[share.format.format] += share.parameters
    name = totals.most_common(1)[0][0]
    tables = weights.embedding.format, weights.head.format
    return replace(precision(name, engine), other=BYTES[manifest.dtype], embedding=tables[0], head=tables[1])


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
    """Bytes of all weights and of the rotary tables; a tied embedding counts once."""
    if sizes.stored_bytes is not None:
        return sizes.stored_bytes
    tables = stored.embedding_bytes(sizes) + stored.head_bytes(sizes)
    return stored.matrix_bytes(sizes) + tables + (sizes.small + sizes.rotary) * stored.other


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
