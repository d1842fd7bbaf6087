"""Inputs and outputs of an exported decoder: names, dtypes and shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvexport.files.schema import Table

VARIANT, EVICTING = "std24", "std24-evicting"  # the second if a layer has a token budget (kvexport.eviction)
OPSET = 24
GRAPH_FILE = "decoder.onnx"
DATA_FILE = "decoder.onnx.data"  # weights of every graph of a bundle
LOWERED_FILES = {"cpu": "decoder.cpu.onnx", "cuda": "decoder.cuda.onnx"}  # by device of ONNX Runtime

BATCH, SEQUENCE, LOGITS, CAPACITY, BUDGET = "batch", "sequence", "logits", "capacity", "budget"
KEY, VALUE, STATE = "key", "value", "state"  # tensors of a layer's cache; a state only if it evicts
# Tokens of a prompt that one call runs, unless the caller chooses another number: as fast as more, and
# attention scores take half the memory that 256 need.
CHUNK = 128
DEFAULT_CAPACITY = 4096  # tokens of a sequence, if the model's maximum is larger, or it has none
_WINDOW = "window_"

Shape = tuple[int | str, ...]  # a name is a size that the caller chooses


def past(layer: int, which: str) -> str:
    """Name of the input with a layer's cache; `which` is "key", "value" or "state"."""
    return f"past_key_values.{layer}.{which}"


def present(layer: int, which: str) -> str:
    """Name of the output that is the same buffer, with the tokens of this call written."""
    return f"present.{layer}.{which}"


def update(layer: int, which: str) -> str:
    """Name of the output with the tokens of this call alone, [batch, kv_heads, sequence, width].

    In graphs that cannot write a cache in place: the caller writes them from slot write_indices[b] on.
    """
    return f"update.{layer}.{which}"


def slots_output(layer: int) -> str:
    """Name of the output with the slot of each head's first new token, int64 [batch·kv_heads].

    In graphs that cannot write a cache in place, for layers that evict; the other new tokens take the slots
    after it.
    """
    return f"slots.{layer}"


def attention_tap(layer: int) -> str:
    """Name of the value [batch, sequence, hidden] that a layer's attention adds to the residual stream."""
    return f"layers.{layer}.attention"


def attention_residual(layer: int) -> str:
    """Name of the residual stream [batch, sequence, hidden] after a layer's attention was added."""
    return f"layers.{layer}.attention_residual"


def residual_tap(layer: int) -> str:
    """Name of the residual stream [batch, sequence, hidden] after a layer."""
    return f"layers.{layer}.residual"


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of the graph.

    Attributes:
        name: in the graph.
        dtype: numpy's name, or "bfloat16".
        shape: sizes; a name stands for a size that the caller chooses.
    """

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class GraphContract:
    """Inputs, outputs and sizes of decoder.onnx.

    Attributes:
        variant: `VARIANT` or `EVICTING`.
        opset: of ONNX.
        dtype: of weights and cache.
        capacity: the largest number of tokens of a sequence.
        vocab_size, hidden_size, num_layers: sizes of the model.
        inputs, outputs: in the graph's order.
    """

    variant: str
    opset: int
    dtype: str
    capacity: int
    vocab_size: int
    hidden_size: int
    num_layers: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def to_json(self) -> dict[str, Any]:
        """Values for `json.dumps`; `from_table` reads them back."""
        return asdict(self)

    @classmethod
    def from_table(cls, table: Table) -> GraphContract:
        """The inverse of `to_json`.

        Raises:
            KvexportError: the table's error class: a key is missing, unknown or of another type.
        """
        graph = cls(
            variant=table.string("variant"),
            opset=table.integer("opset"),
            dtype=table.string("dtype"),
            capacity=table.integer("capacity"),
            vocab_size=table.integer("vocab_size"),
            hidden_size=table.integer("hidden_size"),
            num_layers=table.integer("num_layers"),
            inputs=tuple(_spec(each) for each in table.tables("inputs")),
            outputs=tuple(_spec(each) for each in table.tables("outputs")),
        )
        table.only()
        return graph


def _spec(table: Table) -> TensorSpec:
    shape = table.list("shape")
    if not all(isinstance(size, (int, str)) and not isinstance(size, bool) for size in shape):
        table.fail("shape", "a list of integers and names")
    spec = TensorSpec(table.string("name"), table.string("dtype"), tuple(shape))
    table.only()
    return spec


def heads_along_batch(count: int) -> str:
    """Size of the first axis if each of `count` heads of a sequence is a row of the batch."""
    return f"{BATCH}*{count}"


def sized(size: int | str, sizes: Mapping[str, int]) -> int | str:
    """A size of a shape as a number if `sizes` has its name; also for multiples such as "batch*8"."""
    if isinstance(size, int):
        return size
    name, _, times = size.partition("*")
    return sizes[name] * int(times or 1) if name in sizes else size


def ring_of(window: int | None, capacity: int, evicts: bool) -> int | None:
    """The window W of a layer whose cache is a ring; None if its cache is not.

    A layer that attends to a window below the capacity, and does not evict, caches only the window and the
    tokens of one call, in a ring of R slots: the token at position p is in slot p mod R. R is the caller's
    choice, at least W + S - 1 for calls of S tokens, and a call must not wrap: (p mod R) + S <= R for its
    first position p. A ring of `capacity` slots never wraps, and takes calls of any length.
    """
    return window if window is not None and window < capacity and not evicts else None


def ring_axis(window: int) -> str:
    """Name of the number of slots R of a ring, such as "window_512"."""
    return f"{_WINDOW}{window}"


def window_of(size: int | str) -> int | None:
    """The window of a ring from the name of its number of slots; None for other sizes."""
    return int(size.removeprefix(_WINDOW)) if isinstance(size, str) and size.startswith(_WINDOW) else None


def ring_slots(window: int, capacity: int, chunk: int) -> int:
    """The number of slots that runtimes give a ring, for calls of at most `chunk` tokens."""
    return min(capacity, window + chunk)


def ring_sizes(axes: Iterable[int | str], capacity: int, chunk: int) -> dict[str, int]:
    """`ring_slots` of each name of a ring's slots among `axes`, by that name."""
    windows = {window for window in map(window_of, axes) if window is not None}
    return {ring_axis(window): ring_slots(window, capacity, chunk) for window in sorted(windows)}


def cache_specs(
    layer: int,
    *,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    dtype: str,
    evicts: bool,
    ring: int | None = None,
) -> tuple[TensorSpec, ...]:
    """The cache inputs of a layer.

    Without eviction: key and value, [batch, kv_heads, capacity, width], or "window_W" in place of the
    capacity for a ring (`ring_of`). With eviction each head has its own slots: key, value and state,
    [batch·kv_heads, 1, budget, width]. The state is float32, width 2: score, and position + 1. Buffers of
    zeros are empty.
    """
    widths = {KEY: key_dim, VALUE: value_dim}
    if not evicts:
        slots = CAPACITY if ring is None else ring_axis(ring)
        return tuple(
            TensorSpec(past(layer, which), dtype, (BATCH, kv_heads, slots, width))
            for which, width in widths.items()
        )
    rows = heads_along_batch(kv_heads)
    specs = [
        TensorSpec(past(layer, which), dtype, (rows, 1, BUDGET, width)) for which, width in widths.items()
    ]
    return (*specs, TensorSpec(past(layer, STATE), "float32", (rows, 1, BUDGET, 2)))


def contract(
    *, dtype: str, capacity: int, vocab_size: int, hidden_size: int, caches: Sequence[tuple[TensorSpec, ...]]
) -> GraphContract:
    """The contract of a decoder whose layers have these cache inputs (`cache_specs`)."""
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


# position_ids are consecutive; a layer that does not evict writes to these slots.
# write_indices: number of slots in use, which is the first slot to write; layers that evict overwrite if it
# is full. logits_index: the tokens of the sequence that get logits.
TOKEN_INPUTS = (
    TensorSpec("input_ids", "int64", (BATCH, SEQUENCE)),
    TensorSpec("position_ids", "int64", (BATCH, SEQUENCE)),
    TensorSpec("write_indices", "int64", (BATCH,)),
    TensorSpec("logits_index", "int64", (BATCH, LOGITS)),
)
