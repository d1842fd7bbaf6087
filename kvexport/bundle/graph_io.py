"""The graph contract as data: which tensors an exported decoder takes and gives, under which names.

Knows names, dtypes and shapes, and needs nothing but the standard library, so that a runtime can read a
bundle's contract without any graph package; must not know how the graph computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

VARIANT, EVICTING = (
    "std24",
    "std24-evicting",
)  # the second where layers hold a budget of tokens (`kvexport.eviction.config`)
OPSET = 24
GRAPH_FILE = "decoder.onnx"
DATA_FILE = "decoder.onnx.data"
LOWERED_FILES = {
    "cpu": "decoder.cpu.onnx",
    "cuda": "decoder.cuda.onnx",
}  # by ONNX Runtime's device, with the same data file

BATCH, SEQUENCE, LOGITS, CAPACITY, BUDGET = "batch", "sequence", "logits", "capacity", "budget"
KEY, VALUE, STATE = "key", "value", "state"  # what a layer caches; a state only where it evicts

Shape = tuple[int | str, ...]  # a name stands for a size that the caller chooses


def past(layer: int, which: str) -> str:
    """Name of the input that holds a layer's cache; `which` is "key", "value" or "state"."""
    return f"past_key_values.{layer}.{which}"


def present(layer: int, which: str) -> str:
    """Name of the output that is the same buffer after this call's tokens were written."""
    return f"present.{layer}.{which}"


def update(layer: int, which: str) -> str:
    """Name of the output that holds this call's tokens alone [batch, kv_heads, sequence, width], in graphs that cannot
    write a cache: the caller writes them from slot write_indices[b] on."""
    return f"update.{layer}.{which}"


def slots_output(layer: int) -> str:
    """Name of the output that says, in graphs that cannot write a cache, the slot of each head's first new token in a layer
    that evicts, int64 [batch·kv_heads]; the others follow it."""
    return f"slots.{layer}"


def attention_tap(layer: int) -> str:
    """Name of the value [batch, sequence, hidden] that a layer's attention adds to the residual stream."""
    return f"layers.{layer}.attention"


def attention_residual(layer: int) -> str:
    """Name of the sum of the two."""
    return f"layers.{layer}.attention_residual"


def residual_tap(layer: int) -> str:
    """Name of the residual stream [batch, sequence, hidden] after a layer."""
    return f"layers.{layer}.residual"


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of the graph; `dtype` is numpy's name for it (or "bfloat16")."""

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class GraphContract:
    """What a caller of decoder.onnx must know; `capacity` is the most tokens that a sequence may ever hold."""

    variant: str
    opset: int
    dtype: str  # of the weights and the cache
    capacity: int
    vocab_size: int
    hidden_size: int
    num_layers: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def to_json(self) -> dict[str, Any]:
        """As what `json.dumps` takes; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> GraphContract:
        """The inverse of `to_json`, for a mapping that was checked to be one.

        Raises:
            KeyError, TypeError: the mapping is not what `to_json` made.
        """

        def specs(entries: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(
                TensorSpec(entry["name"], entry["dtype"], tuple(entry["shape"])) for entry in entries
            )

        return cls(**{**raw, "inputs": specs(raw["inputs"]), "outputs": specs(raw["outputs"])})


def heads_along_batch(count: int) -> str:
    """Size of the first axis where every head of a sequence is a row of the batch."""
    return f"{BATCH}*{count}"


def sized(size: int | str, sizes: Mapping[str, int]) -> int | str:
    """A size of a shape as a number, where `sizes` has its name or, of "batch*8", the name that it is a multiple of."""
    if isinstance(size, int):
        return size
    name, _, times = size.partition("*")
    return sizes[name] * int(times or 1) if name in sizes else size


def cache_specs(
    layer: int, *, kv_heads: int, key_dim: int, value_dim: int, dtype: str, evicts: bool
) -> tuple[TensorSpec, ...]:
    """The cache inputs of a layer: key and value, [batch, kv_heads, capacity, width].

    Of one that evicts key, value and state, [batch·kv_heads, 1, budget, width]: each head has its own slots. The state is
    float32, two numbers a slot: what its token is ranked by, and its position + 1. Buffers of zeros are empty.
    """
    widths = {KEY: key_dim, VALUE: value_dim}
    if not evicts:
        return tuple(
            TensorSpec(past(layer, which), dtype, (BATCH, kv_heads, CAPACITY, width))
            for which, width in widths.items()
        )
    rows = heads_along_batch(kv_heads)
    held = [
        TensorSpec(past(layer, which), dtype, (rows, 1, BUDGET, width)) for which, width in widths.items()
    ]
    return (*held, TensorSpec(past(layer, STATE), "float32", (rows, 1, BUDGET, 2)))


def contract(
    *, dtype: str, capacity: int, vocab_size: int, hidden_size: int, caches: Sequence[tuple[TensorSpec, ...]]
) -> GraphContract:
    """The contract of a decoder whose layers have the given caches (specs of the past inputs)."""
    presents = [
        TensorSpec(spec.name.replace("past_key_values", "present"), spec.dtype, spec.shape)
        for each in caches
        for spec in each
    ]
    evicts = any(BUDGET in spec.shape for each in caches for spec in each)
    return GraphContract(
        variant=EVICTING if evicts else VARIANT,
        opset=OPSET,
        dtype=dtype,
        capacity=capacity,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=len(caches),
        inputs=(*TOKEN_INPUTS, *(spec for each in caches for spec in each)),
        outputs=(TensorSpec("logits", "float32", (BATCH, LOGITS, vocab_size)), *presents),
    )


TOKEN_INPUTS = (
    TensorSpec("input_ids", "int64", (BATCH, SEQUENCE)),
    TensorSpec(
        "position_ids", "int64", (BATCH, SEQUENCE)
    ),  # consecutive; a layer that does not evict writes to these slots
    TensorSpec(
        "write_indices", "int64", (BATCH,)
    ),  # slots in use: the first one written, in layers that evict if there is room
    TensorSpec("logits_index", "int64", (BATCH, LOGITS)),  # which of the sequence's tokens get logits
)
