"""Attention over a fixed number of slots, as ONNX nodes: a full KV head overwrites its token of highest rank.

Heads lie along the batch axis, [batch·N, 1, slots, width], so that TensorScatter, which has one index for
each row of the batch, has one for each head. The reference is
`kvexport.eviction.reference_cache.EvictingCache.write`, except that the caller makes room for several tokens.
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
from kvexport.graph.blocks import attention_products
from kvexport.graph.eviction_inputs import STATE_DTYPE, EvictionInputs, HeadInputs, state_row
from kvexport.graph.nodes import dtype_of, sizes
from kvexport.graph.weights import NUMPY_DTYPES, largest_number
from kvexport.model.decoder import Attention

__all__ = ["EvictionAttentionBuilder", "EvictionCacheValues", "EvictionInputs"]


@dataclass(frozen=True)
class EvictionCacheValues:
    """The cache of a layer with eviction.

    Attributes:
        key: [batch·N, 1, slots, key_dim].
        value: [batch·N, 1, slots, value_dim].
        state: float32 [batch·N, 1, slots, 2], score and position + 1 of each slot's token
            (`kvexport.eviction.config`).
    """

    key: ir.Value
    value: ir.Value
    state: ir.Value


class EvictionAttentionBuilder:
    """Add cache update and attention of layer `index` to a graph, between its projections."""

    def __init__(self, shared: EvictionInputs, index: int, attention: Attention, name: str) -> None:
        self._shared, self._nodes, self._index, self._attention = shared, shared.nodes, index, attention
        self._name, self._rows = name, heads_along_batch(attention.num_kv_heads)

    def add(
        self, query: ir.Value, key: ir.Value, value: ir.Value, cache: EvictionCacheValues
    ) -> tuple[ir.Value, EvictionCacheValues]:
        """Write the new tokens into the cache, and attend to it.

        Args:
            query: [batch, H, sequence, key_dim].
            key: keys of the new tokens, [batch, N, sequence, key_dim].
            value: values of the new tokens, [batch, N, sequence, value_dim].

        Returns:
            head outputs [batch, H, sequence, value_dim], and the written cache.
        """
        attention, nodes, name = self._attention, self._nodes, self._name
        heads = self._shared.for_heads(attention.num_kv_heads, cache.state)
        key, value = (
            self._heads_to_batch(new, 1, f"{name}.{which}.new") for which, new in ((KEY, key), (VALUE, value))
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
        query = self._heads_to_batch(query, attention.queries_per_kv_head, f"{name}.query")
        inputs = (query, written.key, written.value, mask)
        mixed = attention_products(nodes, attention, *inputs, name=f"{name}.by_group.mixed")
        to = nodes.integers(-1, attention.num_heads, 0, attention.value_dim)
        shape = (BATCH, attention.num_heads, SEQUENCE, attention.value_dim)
        return nodes.op("Reshape", mixed, to, name=f"{name}.mixed", shape=shape), written

    def _by_head(self, query: ir.Value, cache: EvictionCacheValues, mask: ir.Value) -> ir.Value:
        """Attention of unshared KV heads along the head axis: TensorRT has no fused kernel for one head."""
        nodes, name, attention = self._nodes, self._name, self._attention
        parts = ((KEY, cache.key), (VALUE, cache.value), ("mask", mask))
        key, value, mask = (self._batch_to_heads(x, f"{name}.{which}.by_head") for which, x in parts)
        return attention_products(nodes, attention, query, key, value, mask, name=f"{name}.mixed")

    def _write(self, which: str, cache: ir.Value, new: ir.Value, slot: ir.Value) -> ir.Value:
        name, dtype = present(self._index, which), dtype_of(cache)
        return self._nodes.op(
            "TensorScatter", cache, new, slot, name=name, axis=-2, mode="linear", dtype=dtype
        )

    def _heads_to_batch(self, x: ir.Value, each: int, name: str) -> ir.Value:
        """Reshape x [batch, N·each, sequence, width] to [batch·N, each, sequence, width]."""
        width = sizes(x)[3]
        assert isinstance(width, int)
        shape = (self._rows, each, SEQUENCE, width)
        return self._nodes.op("Reshape", x, self._nodes.integers(-1, each, 0, width), name=name, shape=shape)

    def _batch_to_heads(self, x: ir.Value, name: str) -> ir.Value:
        """Reshape x [batch·N, 1, n, m] to [batch, N, n, m]."""
        heads = self._attention.num_kv_heads
        to, shape = self._nodes.integers(-1, heads, 0, 0), (BATCH, heads, *sizes(x)[2:])
        return self._nodes.op("Reshape", x, to, name=name, shape=shape, dtype=dtype_of(x))

    def _new_state(self, heads: HeadInputs, key: ir.Value) -> ir.Value:
        """State of the new tokens, [batch·N, 1, sequence, 2]."""
        nodes, shape = self._nodes, (self._rows, 1, SEQUENCE, 2)
        columns = {SCORE: self._scores(heads, key), POSITION_PLUS_ONE: heads.position_plus_one}
        ordered, name = [columns[each] for each in sorted(columns)], f"{self._name}.state.new"
        return nodes.op("Concat", *ordered, name=name, shape=shape, dtype=STATE_DTYPE, axis=-1)

    def _scores(self, heads: HeadInputs, key: ir.Value) -> ir.Value:
        """Scores of the new tokens by the policy, [batch·N, 1, sequence, 1]."""
        nodes, policy = self._nodes, self._shared.eviction.policy
        name, shape = f"{self._name}.score", (self._rows, 1, SEQUENCE, 1)
        if policy == "window":
            one = nodes.number("evict.one", 1.0, STATE_DTYPE)
            plain = nodes.op(
                "Sub", one, heads.position_plus_one, name=f"{name}.age", shape=shape, dtype=STATE_DTYPE
            )
            return self._tie_to_layer(plain, key, name)
        if policy == "random":
            return self._tie_to_layer(self._random_scores(f"{name}.chance", shape), key, name)
        wide = key if nodes.dtype == STATE_DTYPE else nodes.cast(key, STATE_DTYPE, f"{name}.key")
        square = nodes.op("Mul", wide, wide, name=f"{name}.square", dtype=STATE_DTYPE)
        axes = nodes.integers(-1)
        total = nodes.op(
            "ReduceSum", square, axes, name=f"{name}.sum", shape=shape, dtype=STATE_DTYPE, keepdims=1
        )
        norm = nodes.op("Sqrt", total, name=f"{name}.norm", dtype=STATE_DTYPE)
        return nodes.op("Mul", norm, heads.later, name=name, dtype=STATE_DTYPE)

    def _tie_to_layer(self, score: ir.Value, key: ir.Value, name: str) -> ir.Value:
        """Add 0 · keys to a score, so that it depends on the layer.

        The builder of TensorRT-RTX 1.7.1 ends in a segmentation fault on two layers with ALiBi whose states
        depend on positions alone.
        """
        nodes, zero = self._nodes, self._nodes.number("evict.zero", 0.0, STATE_DTYPE)
        wide = key if nodes.dtype == STATE_DTYPE else nodes.cast(key, STATE_DTYPE, f"{name}.key")
        none = nodes.op("Mul", wide, zero, name=f"{name}.none", dtype=STATE_DTYPE)
        axes, shape = nodes.integers(-1), sizes(score)
        total = nodes.op(
            "ReduceSum", none, axes, name=f"{name}.nothing", shape=shape, dtype=STATE_DTYPE, keepdims=1
        )
        return nodes.op("Add", score, total, name=name, dtype=STATE_DTYPE)

    def _random_scores(self, name: str, shape: tuple[int | str, ...]) -> ir.Value:
        """Scores of the policy random: a constant table, read at positions with one offset for each head."""
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
        first = nodes.constant(f"{name}.offsets", offsets[None, :, None])
        index = nodes.op("Add", row, first, name=f"{name}.at", shape=(BATCH, count, SEQUENCE), dtype="int64")
        table = nodes.constant("evict.chances", random_scores(shared.capacity))
        scores = nodes.op(
            "Gather", table, index, name=f"{name}.drawn", shape=sizes(index), dtype=STATE_DTYPE, axis=0
        )
        scores = nodes.op(
            "Unsqueeze",
            scores,
            nodes.integers(3),
            name=f"{name}.column",
            shape=(*sizes(index), 1),
            dtype=STATE_DTYPE,
        )
        return nodes.op(
            "Reshape", scores, nodes.integers(-1, 1, 0, 1), name=name, shape=shape, dtype=STATE_DTYPE
        )

    def _slot(self, heads: HeadInputs, state: ir.Value) -> ir.Value:
        """The slot of the first new token, int64 [batch·N]: the first free slot, or the one of highest rank.

        Further new tokens are written to the slots after it; the caller has made room for them.
        """
        nodes, name, eviction = self._nodes, f"{self._name}.slot", self._shared.eviction
        shape = (self._rows, 1, 1, BUDGET)

        def op(kind: str, *inputs: ir.Value, name: str, dtype: str = "bool") -> ir.Value:
            return nodes.op(kind, *inputs, name=name, shape=shape, dtype=dtype)

        def number(label: str, value: float) -> ir.Value:
            return nodes.number(f"evict.{label}", value, STATE_DTYPE)

        score, slot_positions = (
            state_row(nodes, state, which, f"{name}.{label}")
            for which, label in ((SCORE, "score"), (POSITION_PLUS_ONE, "stored"))
        )
        recent = nodes.op(
            "Sub",
            heads.first,
            number("recent", eviction.protect_recent),
            name=f"{name}.recent",
            dtype=STATE_DTYPE,
        )
        old = op("LessOrEqual", slot_positions, recent, name=f"{name}.old")
        late = op("Greater", slot_positions, number("sinks", eviction.protect_first), name=f"{name}.late")
        evictable = op("And", old, late, name=f"{name}.evictable")
        ranks = op(
            "Where", evictable, score, number("spared", -NEVER), name=f"{name}.ranks", dtype=STATE_DTYPE
        )
        if self._attention.window is not None:
            window = number(f"window_{self._attention.window}", self._attention.window)
            edge = nodes.op("Sub", heads.first, window, name=f"{name}.edge", dtype=STATE_DTYPE)
            outside = op("LessOrEqual", slot_positions, edge, name=f"{name}.unseen")
            age = op("Sub", number("latest", LATEST), slot_positions, name=f"{name}.age", dtype=STATE_DTYPE)
            rank_outside = op(
                "Mul", age, number("before_all", UNSEEN), name=f"{name}.before_all", dtype=STATE_DTYPE
            )
            ranks = op("Where", outside, rank_outside, ranks, name=f"{name}.ranks.unseen", dtype=STATE_DTYPE)
        is_rewrite = op("Equal", slot_positions, heads.first, name=f"{name}.same")
        ranks = op(
            "Where", is_rewrite, number("again", NEVER), ranks, name=f"{name}.ranks.again", dtype=STATE_DTYPE
        )
        row = (self._rows, 1, 1, 1)
        highest = nodes.op(
            "ArgMax", ranks, name=f"{name}.highest", shape=row, dtype="int64", axis=3, keepdims=1
        )
        evicted = nodes.cast(highest, STATE_DTYPE, f"{name}.taken")
        chosen = nodes.op(
            "Where",
            heads.has_room,
            heads.filled,
            evicted,
            name=f"{name}.chosen",
            shape=row,
            dtype=STATE_DTYPE,
        )
        flat = nodes.op(
            "Reshape", chosen, nodes.integers(-1), name=f"{name}.flat", shape=(self._rows,), dtype=STATE_DTYPE
        )
        return nodes.cast(flat, "int64", name)

    def _mask(self, heads: HeadInputs, state: ir.Value) -> ir.Value:
        """The mask, bool [batch·N, 1, sequence, slots], or the ALiBi bias [batch·N, H/N, sequence, slots]."""
        nodes, name, window, shape = (
            self._nodes,
            f"{self._name}.mask",
            self._attention.window,
            (self._rows, 1, SEQUENCE, BUDGET),
        )
        slot_positions = state_row(nodes, state, POSITION_PLUS_ONE, f"{name}.held")
        zero = nodes.number("evict.zero", 0.0, STATE_DTYPE)
        occupied = nodes.op("Greater", slot_positions, zero, name=f"{name}.taken", dtype="bool")
        past = nodes.op(
            "LessOrEqual",
            slot_positions,
            heads.position_plus_one,
            name=f"{name}.causal",
            shape=shape,
            dtype="bool",
        )
        visible = nodes.op("And", past, occupied, name=f"{name}.visible", shape=shape, dtype="bool")
        if window is not None:
            width = nodes.number(f"evict.window_{window}", window, STATE_DTYPE)
            edge = nodes.op("Sub", heads.position_plus_one, width, name=f"{name}.edge", dtype=STATE_DTYPE)
            in_window = nodes.op(
                "Greater", slot_positions, edge, name=f"{name}.in_window", shape=shape, dtype="bool"
            )
            visible = nodes.op(
                "And", visible, in_window, name=f"{name}.visible_in_window", shape=shape, dtype="bool"
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
            "Sub",
            slot_positions,
            heads.position_plus_one,
            name=f"{name}.distance",
            shape=shape,
            dtype=STATE_DTYPE,
        )
        shape = (self._rows, each, SEQUENCE, BUDGET)
        bias = nodes.op("Mul", distance, slope, name=f"{name}.alibi", shape=shape, dtype=STATE_DTYPE)
        if nodes.dtype != STATE_DTYPE:
            bias = nodes.cast(bias, nodes.dtype, f"{name}.alibi.{nodes.dtype}")
        lowest = nodes.constant(
            "mask.hidden", np.array(-largest_number(nodes.dtype), dtype=NUMPY_DTYPES[nodes.dtype])
        )
        return nodes.op("Where", visible, bias, lowest, name=f"{name}.bias", shape=shape)
