"""Attention over a budget of slots, as nodes: every KV head overwrites the token that ranks highest in it.

Heads lie along the batch, [batch·N, 1, slots, width], so that TensorScatter's index for each row of a batch is one for each
head. Knows `kvexport.eviction.reference_cache.EvictingCache.write`, its oracle, but for making room for several tokens, which is the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kvexport.bundle.graph_io import BATCH, BUDGET, KEY, SEQUENCE, STATE, VALUE, heads_along_batch, present
from kvexport.eviction.config import (
    LATEST,
    NEVER,
    POSITION_PLUS_ONE,
    SCORE,
    UNSEEN,
    random_offsets,
    random_scores,
)
from kvexport.graph.eviction_inputs import STATE_DTYPE, EvictionInputs, HeadInputs, row_of
from kvexport.graph.nodes import dtype_of, sizes
from kvexport.graph.weights import NUMPY_DTYPES, largest
from kvexport.model.decoder import Attention

__all__ = ["EvictionAttentionBuilder", "EvictionCacheValues", "EvictionInputs"]


@dataclass(frozen=True)
class EvictionCacheValues:
    """What a layer holds: [batch·N, 1, slots, key_dim], [.., value_dim], and the state of each slot [.., 2] (`Eviction`)."""

    key: ir.Value
    value: ir.Value
    state: ir.Value


class EvictionAttentionBuilder:
    """Writes the cache and the attention of layer `index`, between projections and output."""

    def __init__(self, shared: EvictionInputs, index: int, attention: Attention, name: str) -> None:
        self._shared, self._nodes, self._index, self._attention = shared, shared.nodes, index, attention
        self._name, self._rows = name, heads_along_batch(attention.num_kv_heads)

    def add(
        self, query: ir.Value, key: ir.Value, value: ir.Value, cache: EvictionCacheValues
    ) -> tuple[ir.Value, EvictionCacheValues]:
        """Mapped queries [batch, H, sequence, key_dim] and new keys and values [batch, N, sequence, ...] to head outputs
        [batch, H, sequence, value_dim] and the written cache."""
        attention, nodes, name = self._attention, self._nodes, self._name
        heads = self._shared.heads(attention.num_kv_heads, cache.state)
        key, value = (
            self._folded(new, 1, f"{name}.{which}.new") for which, new in ((KEY, key), (VALUE, value))
        )
        slot = self._slot(heads, cache.state)
        parts = (
            (KEY, cache.key, key),
            (VALUE, cache.value, value),
            (STATE, cache.state, self._new_state(heads, key)),
        )
        written = EvictionCacheValues(*(self._write(which, old, new, slot) for which, old, new in parts))
        mask = self._mask(heads, written.state)
        if attention.queries_per_kv_head == 1:
            return self._by_head(query, written, mask), written
        query = self._folded(query, attention.queries_per_kv_head, f"{name}.query")
        inputs, shape = (query, written.key, written.value, mask), (*sizes(query)[:3], attention.value_dim)
        mixed = nodes.op(
            "Attention", *inputs, name=f"{name}.by_group.mixed", shape=shape, scale=attention.scale
        )
        to = nodes.integers(-1, attention.num_heads, 0, attention.value_dim)
        shape = (BATCH, attention.num_heads, SEQUENCE, attention.value_dim)
        return nodes.op("Reshape", mixed, to, name=f"{name}.mixed", shape=shape), written

    def _by_head(self, query: ir.Value, cache: EvictionCacheValues, mask: ir.Value) -> ir.Value:
        """Attention of heads of their own, side by side again: TensorRT has no fused kernel for a single head."""
        nodes, name, attention = self._nodes, self._name, self._attention
        parts = ((KEY, cache.key), (VALUE, cache.value), ("mask", mask))
        inputs = (query, *(self._unfolded(x, f"{name}.{which}.by_head") for which, x in parts))
        shape = (*sizes(query)[:3], attention.value_dim)
        return nodes.op("Attention", *inputs, name=f"{name}.mixed", shape=shape, scale=attention.scale)

    def _write(self, which: str, cache: ir.Value, new: ir.Value, slot: ir.Value) -> ir.Value:
        name, dtype = present(self._index, which), dtype_of(cache)
        return self._nodes.op(
            "TensorScatter", cache, new, slot, name=name, axis=-2, mode="linear", dtype=dtype
        )

    def _folded(self, x: ir.Value, each: int, name: str) -> ir.Value:
        """[batch, N·each, sequence, width] to [batch·N, each, sequence, width]."""
        width = sizes(x)[3]
        assert isinstance(width, int)
        shape = (self._rows, each, SEQUENCE, width)
        return self._nodes.op("Reshape", x, self._nodes.integers(-1, each, 0, width), name=name, shape=shape)

    def _unfolded(self, x: ir.Value, name: str) -> ir.Value:
        """[batch·N, 1, n, m] to [batch, N, n, m]: the same numbers in the same order."""
        heads = self._attention.num_kv_heads
        to, shape = self._nodes.integers(-1, heads, 0, 0), (BATCH, heads, *sizes(x)[2:])
        return self._nodes.op("Reshape", x, to, name=name, shape=shape, dtype=dtype_of(x))

    def _new_state(self, heads: HeadInputs, key: ir.Value) -> ir.Value:
        """Of the new tokens, [batch·N, 1, sequence, 2]."""
        nodes, shape = self._nodes, (self._rows, 1, SEQUENCE, 2)
        columns = {SCORE: self._scores(heads, key), POSITION_PLUS_ONE: heads.stored}
        ordered, name = [columns[each] for each in sorted(columns)], f"{self._name}.state.new"
        return nodes.op("Concat", *ordered, name=name, shape=shape, dtype=STATE_DTYPE, axis=-1)

    def _scores(self, heads: HeadInputs, key: ir.Value) -> ir.Value:
        """[batch·N, 1, sequence, 1]."""
        nodes, policy = self._nodes, self._shared.eviction.policy
        name, shape = f"{self._name}.score", (self._rows, 1, SEQUENCE, 1)
        if policy == "window":
            one = nodes.number("evict.one", 1.0, STATE_DTYPE)
            plain = nodes.op("Sub", one, heads.stored, name=f"{name}.age", shape=shape, dtype=STATE_DTYPE)
            return self._of_this_layer(plain, key, name)
        if policy == "random":
            return self._of_this_layer(self._chances(f"{name}.chance", shape), key, name)
        wide = key if nodes.dtype == STATE_DTYPE else nodes.cast(key, STATE_DTYPE, f"{name}.key")
        square = nodes.op("Mul", wide, wide, name=f"{name}.square", dtype=STATE_DTYPE)
        axes = nodes.integers(-1)
        total = nodes.op(
            "ReduceSum", square, axes, name=f"{name}.sum", shape=shape, dtype=STATE_DTYPE, keepdims=1
        )
        norm = nodes.op("Sqrt", total, name=f"{name}.norm", dtype=STATE_DTYPE)
        return nodes.op("Mul", norm, heads.later, name=name, dtype=STATE_DTYPE)

    def _of_this_layer(self, score: ir.Value, key: ir.Value, name: str) -> ir.Value:
        """The same score, made of the layer's keys: two layers whose states depend on positions alone, and ALiBi, kill the
        builder of TensorRT-RTX 1.7.1 by a segmentation fault."""
        nodes, zero = self._nodes, self._nodes.number("evict.zero", 0.0, STATE_DTYPE)
        wide = key if nodes.dtype == STATE_DTYPE else nodes.cast(key, STATE_DTYPE, f"{name}.key")
        none = nodes.op("Mul", wide, zero, name=f"{name}.none", dtype=STATE_DTYPE)
        axes, shape = nodes.integers(-1), sizes(score)
        total = nodes.op(
            "ReduceSum", none, axes, name=f"{name}.nothing", shape=shape, dtype=STATE_DTYPE, keepdims=1
        )
        return nodes.op("Add", score, total, name=name, dtype=STATE_DTYPE)

    def _chances(self, name: str, shape: tuple[int | str, ...]) -> ir.Value:
        nodes, shared, count = self._nodes, self._shared, self._attention.num_kv_heads
        offsets = random_offsets(self._index, count, shared.capacity)
        row = nodes.op(
            "Unsqueeze",
            shared.positions,
            nodes.integers(1),
            name=f"{name}.positions",
            shape=(BATCH, 1, SEQUENCE),
            dtype="int64",
        )
        begins = nodes.constant(f"{name}.offsets", offsets[None, :, None])
        at = nodes.op("Add", row, begins, name=f"{name}.at", shape=(BATCH, count, SEQUENCE), dtype="int64")
        numbers = nodes.constant("evict.chances", random_scores(shared.capacity))
        drawn = nodes.op(
            "Gather", numbers, at, name=f"{name}.drawn", shape=sizes(at), dtype=STATE_DTYPE, axis=0
        )
        drawn = nodes.op(
            "Unsqueeze",
            drawn,
            nodes.integers(3),
            name=f"{name}.column",
            shape=(*sizes(at), 1),
            dtype=STATE_DTYPE,
        )
        return nodes.op(
            "Reshape", drawn, nodes.integers(-1, 1, 0, 1), name=name, shape=shape, dtype=STATE_DTYPE
        )

    def _slot(self, heads: HeadInputs, state: ir.Value) -> ir.Value:
        """The slot of the first new token, int64 [batch·N]: after those in use, or where the highest priority is.

        Several tokens are written from there on: whoever calls the graph with them has made room for all.
        """
        nodes, name, eviction = self._nodes, f"{self._name}.slot", self._shared.eviction
        shape = (self._rows, 1, 1, BUDGET)

        def op(kind: str, *inputs: ir.Value, name: str, dtype: str = "bool") -> ir.Value:
            return nodes.op(kind, *inputs, name=name, shape=shape, dtype=dtype)

        def number(label: str, value: float) -> ir.Value:
            return nodes.number(f"evict.{label}", value, STATE_DTYPE)

        score, stored = (
            row_of(nodes, state, which, f"{name}.{label}")
            for which, label in ((SCORE, "score"), (POSITION_PLUS_ONE, "stored"))
        )
        recent = nodes.op(
            "Sub",
            heads.first,
            number("recent", eviction.protect_recent),
            name=f"{name}.recent",
            dtype=STATE_DTYPE,
        )
        old = op("LessOrEqual", stored, recent, name=f"{name}.old")
        late = op("Greater", stored, number("sinks", eviction.protect_first), name=f"{name}.late")
        evictable = op("And", old, late, name=f"{name}.evictable")
        ranks = op(
            "Where", evictable, score, number("spared", -NEVER), name=f"{name}.ranks", dtype=STATE_DTYPE
        )
        if self._attention.window is not None:
            window = number(f"window_{self._attention.window}", self._attention.window)
            edge = nodes.op("Sub", heads.first, window, name=f"{name}.edge", dtype=STATE_DTYPE)
            unseen = op("LessOrEqual", stored, edge, name=f"{name}.unseen")
            age = op("Sub", number("latest", LATEST), stored, name=f"{name}.age", dtype=STATE_DTYPE)
            before = op(
                "Mul", age, number("before_all", UNSEEN), name=f"{name}.before_all", dtype=STATE_DTYPE
            )
            ranks = op("Where", unseen, before, ranks, name=f"{name}.ranks.unseen", dtype=STATE_DTYPE)
        same = op("Equal", stored, heads.first, name=f"{name}.same")
        ranks = op(
            "Where", same, number("again", NEVER), ranks, name=f"{name}.ranks.again", dtype=STATE_DTYPE
        )
        row = (self._rows, 1, 1, 1)
        highest = nodes.op(
            "ArgMax", ranks, name=f"{name}.highest", shape=row, dtype="int64", axis=3, keepdims=1
        )
        taken = nodes.cast(highest, STATE_DTYPE, f"{name}.taken")
        chosen = nodes.op(
            "Where", heads.has_room, heads.filled, taken, name=f"{name}.chosen", shape=row, dtype=STATE_DTYPE
        )
        flat = nodes.op(
            "Reshape", chosen, nodes.integers(-1), name=f"{name}.flat", shape=(self._rows,), dtype=STATE_DTYPE
        )
        return nodes.cast(flat, "int64", name)

    def _mask(self, heads: HeadInputs, state: ir.Value) -> ir.Value:
        """Bool [batch·N, 1, sequence, slots], or ALiBi's bias [batch·N, H/N, sequence, slots]."""
        nodes, name, window, shape = (
            self._nodes,
            f"{self._name}.mask",
            self._attention.window,
            (self._rows, 1, SEQUENCE, BUDGET),
        )
        stored = row_of(nodes, state, POSITION_PLUS_ONE, f"{name}.held")
        zero = nodes.number("evict.zero", 0.0, STATE_DTYPE)
        taken = nodes.op("Greater", stored, zero, name=f"{name}.taken", dtype="bool")
        past = nodes.op("LessOrEqual", stored, heads.stored, name=f"{name}.causal", shape=shape, dtype="bool")
        visible = nodes.op("And", past, taken, name=f"{name}.visible", shape=shape, dtype="bool")
        if window is not None:
            width = nodes.number(f"evict.window_{window}", window, STATE_DTYPE)
            edge = nodes.op("Sub", heads.stored, width, name=f"{name}.edge", dtype=STATE_DTYPE)
            seen = nodes.op("Greater", stored, edge, name=f"{name}.in_window", shape=shape, dtype="bool")
            visible = nodes.op(
                "And", visible, seen, name=f"{name}.visible_in_window", shape=shape, dtype="bool"
            )
        if self._attention.alibi_slopes is None:
            return visible
        each = self._attention.queries_per_kv_head
        slopes = (
            np.asarray(self._attention.alibi_slopes)
            .astype(np.float32)
            .reshape(self._attention.num_kv_heads, each)
        )
        slope = self._shared.along_heads(slopes, (-1, each, 1, 1), f"{name}.slopes")
        distance = nodes.op(
            "Sub", stored, heads.stored, name=f"{name}.distance", shape=shape, dtype=STATE_DTYPE
        )
        shape = (self._rows, each, SEQUENCE, BUDGET)
        bias = nodes.op("Mul", distance, slope, name=f"{name}.alibi", shape=shape, dtype=STATE_DTYPE)
        if nodes.dtype != STATE_DTYPE:
            bias = nodes.cast(bias, nodes.dtype, f"{name}.alibi.{nodes.dtype}")
        lowest = nodes.constant(
            "mask.hidden", np.array(-largest(nodes.dtype), dtype=NUMPY_DTYPES[nodes.dtype])
        )
        return nodes.op("Where", visible, bias, lowest, name=f"{name}.bias", shape=shape)
