"""Attention over a budget of slots, as nodes: every KV head overwrites the token that ranks highest in it.

Heads lie along the batch, [batch·N, 1, slots, width], so that TensorScatter's index for each row of a batch is one for each
head. Knows `kvexport.evicting.EvictingCache.write`, its oracle, but for making room for several tokens, which is the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kvexport.decoder import Attention
from kvexport.eviction import LATER, LATEST, NEVER, SCORE, STORED, UNSEEN, Eviction, random_offsets, random_scores
from kvexport.graph.contract import BATCH, BUDGET, KEY, SEQUENCE, STATE, VALUE, heads_along_batch, present
from kvexport.graph.nodes import NodeBuilder, Nodes, dtype_of, sizes
from kvexport.graph.weights import NUMPY_DTYPES, largest

STATE_DTYPE = "float32"


@dataclass(frozen=True)
class EvictingCache:
    """What a layer holds: [batch·N, 1, slots, key_dim], [.., value_dim], and the state of each slot [.., 2] (`Eviction`)."""

    key: ir.Value
    value: ir.Value
    state: ir.Value


@dataclass(frozen=True)
class _Heads:
    """What layers of N KV heads share, once for each head of the batch; all float32 but `has_room`."""

    stored: ir.Value  # [batch·N, 1, sequence, 1], the new tokens' positions + 1
    first: ir.Value  # [batch·N, 1, 1, 1], the first one's
    filled: ir.Value  # [batch·N, 1, 1, 1], slots in use before this call
    has_room: ir.Value  # bool [batch·N, 1, 1, 1], whether those are not all
    later: ir.Value | None  # [batch·N, 1, sequence, 1], what norms are multiplied with; None: the policy has none


class Evicting:
    """What the layers of a decoder share: positions, slots in use, numbers of chance."""

    def __init__(
        self, nodes: NodeBuilder, eviction: Eviction, capacity: int, positions: ir.Value, write_indices: ir.Value
    ) -> None:
        """
        Args:
            capacity: positions there are.
            positions: of the new tokens, [batch, sequence].
            write_indices: slots in use before them [batch]; as many as there are slots: all.
        """
        self.nodes, self.eviction, self.capacity = nodes, eviction, capacity
        self.positions, self._write_indices = positions, write_indices
        self._shared: dict[int, _Heads] = {}

    def heads(self, count: int, state: ir.Value) -> _Heads:
        """For layers of `count` KV heads; `state` is of any of them."""
        if count not in self._shared:
            self._shared[count] = self._make(count, state)
        return self._shared[count]

    def _make(self, count: int, state: ir.Value) -> _Heads:
        nodes, name, rows = self.nodes, f"evict.{count}_heads", heads_along_batch(count)
        one = nodes.op("Add", self.positions, nodes.integer(1), name=f"{name}.next", dtype="int64")
        shape = (BATCH, 1, SEQUENCE, 1)
        column = nodes.op("Unsqueeze", one, nodes.integers(1, 3), name=f"{name}.column", shape=shape, dtype="int64")
        stored = self._along(column, count, f"{name}.stored")
        rows_of_one = (rows, 1, 1, 1)
        begin, end, axis = (nodes.integers(each) for each in (0, 1, 2))
        first = nodes.op("Slice", stored, begin, end, axis, name=f"{name}.first", shape=rows_of_one, dtype=STATE_DTYPE)
        axes = nodes.integers(1, 2, 3)
        used = nodes.op("Unsqueeze", self._write_indices, axes, name=f"{name}.used", shape=(BATCH, 1, 1, 1), dtype="int64")
        filled = self._along(used, count, f"{name}.filled")
        has_room = nodes.op("Less", filled, self._slots(state, name), name=f"{name}.has_room", dtype="bool")
        later = self._later(stored, name) if self.eviction.policy in ("l2-norm", "keep-high") else None
        return _Heads(stored, first, filled, has_room, later)

    def _slots(self, state: ir.Value, name: str) -> ir.Value:
        """How many slots there are, [batch·N, 1, 1, 1], counted: of a Shape TensorRT-RTX 1.7.1 dies of a segmentation fault."""
        nodes, shape = self.nodes, (*sizes(state)[:3], 1)
        stored = column(nodes, state, STORED, f"{name}.state")
        zero = nodes.number("evict.zero", 0.0, STATE_DTYPE)
        there = nodes.op("GreaterOrEqual", stored, zero, name=f"{name}.there", shape=shape, dtype="bool")
        each = nodes.cast(there, STATE_DTYPE, f"{name}.each_slot")
        shape, axes = (sizes(state)[0], 1, 1, 1), nodes.integers(2)
        return nodes.op("ReduceSum", each, axes, name=f"{name}.slots", shape=shape, dtype=STATE_DTYPE, keepdims=1)

    def _later(self, stored: ir.Value, name: str) -> ir.Value:
        """1 - later, or -(1 + later)."""
        nodes, sign = self.nodes, -1.0 if self.eviction.policy == "l2-norm" else 1.0
        later = nodes.op("Mul", stored, nodes.number("evict.step", LATER, STATE_DTYPE), name=f"{name}.later", dtype=STATE_DTYPE)
        later = nodes.op("Add", later, nodes.number("evict.sign", sign, STATE_DTYPE), name=f"{name}.signed", dtype=STATE_DTYPE)
        return nodes.op("Neg", later, name=f"{name}.factor", dtype=STATE_DTYPE)

    def along_heads(self, values: np.ndarray, shape: tuple[int, ...], name: str) -> ir.Value:
        """A constant [N, ...] once for each sequence: [batch·N, ...] in `shape`, whose first size is -1."""
        nodes, count = self.nodes, len(values)
        ones = (1,) * (values.ndim - 1)
        zero = nodes.op("Sub", self._write_indices, self._write_indices, name=f"{name}.zero", dtype="int64")
        zero = nodes.cast(zero, STATE_DTYPE, f"{name}.zero.{STATE_DTYPE}")
        axes = nodes.integers(*range(1, values.ndim + 1))
        column = nodes.op("Unsqueeze", zero, axes, name=f"{name}.column", shape=(BATCH, 1, *ones), dtype=STATE_DTYPE)
        whole = nodes.op(
            "Add", column, nodes.constant(f"{name}.values", values[None]), name=f"{name}.each", shape=(BATCH, *values.shape),
            dtype=STATE_DTYPE,
        )  # fmt: skip
        rows = heads_along_batch(count)
        return nodes.op("Reshape", whole, nodes.integers(*shape), name=name, shape=(rows, *shape[1:]), dtype=STATE_DTYPE)

    def _along(self, x: ir.Value, count: int, name: str) -> ir.Value:
        """x int64 [batch, 1, n, 1], the same for every head, as float32 [batch·N, 1, n, 1]."""
        nodes, (_, _, length, _) = self.nodes, sizes(x)
        wide, zeros = nodes.cast(x, STATE_DTYPE, f"{name}.{STATE_DTYPE}"), np.zeros((1, count, 1, 1), STATE_DTYPE)
        heads = nodes.constant(f"{name}.heads", zeros)
        spread = nodes.op("Add", wide, heads, name=f"{name}.each", shape=(BATCH, count, length, 1), dtype=STATE_DTYPE)
        shape = (heads_along_batch(count), 1, length, 1)
        return nodes.op("Reshape", spread, nodes.integers(-1, 1, 0, 1), name=name, shape=shape, dtype=STATE_DTYPE)


def column(nodes: Nodes, state: ir.Value, which: int, name: str) -> ir.Value:
    """[rows, 1, slots, 1] of a state [rows, 1, slots, 2]. By Slice: of Gather TensorRT-RTX 1.7.1 dies, too."""
    begin, end, axis = (nodes.integers(each) for each in (which, which + 1, 3))
    shape = (*sizes(state)[:3], 1)
    return nodes.op("Slice", state, begin, end, axis, name=name, shape=shape, dtype=STATE_DTYPE)


class EvictingAttention:
    """Writes the cache and the attention of layer `index`, between projections and output."""

    def __init__(self, shared: Evicting, index: int, attention: Attention, name: str) -> None:
        self._shared, self._nodes, self._index, self._attention = shared, shared.nodes, index, attention
        self._name, self._rows = name, heads_along_batch(attention.num_kv_heads)

    def add(self, query: ir.Value, key: ir.Value, value: ir.Value, cache: EvictingCache) -> tuple[ir.Value, EvictingCache]:
        """Mapped queries [batch, H, sequence, key_dim] and new keys and values [batch, N, sequence, ...] to head outputs
        [batch, H, sequence, value_dim] and the written cache."""
        attention, nodes, name = self._attention, self._nodes, self._name
        heads = self._shared.heads(attention.num_kv_heads, cache.state)
        key, value = (self._folded(new, 1, f"{name}.{which}.new") for new, which in ((key, "key"), (value, "value")))
        slot = self._slot(heads, cache.state)
        state = self._new_state(heads, key)
        written = EvictingCache(
            *(nodes.op("TensorScatter", old, new, slot, name=present(self._index, which), axis=-2, mode="linear", dtype=dtype)
              for which, old, new, dtype in (("key", cache.key, key, None), ("value", cache.value, value, None),
                                             (STATE, cache.state, state, STATE_DTYPE)))
        )  # fmt: skip
        mask = self._mask(heads, written.state)
        if attention.queries_per_kv_head == 1:  # TensorRT has no fused kernel for a single head
            caches = [self._unfolded(x, f"{name}.{which}.by_head") for which, x in ((KEY, written.key), (VALUE, written.value))]
            inputs = (query, *caches, self._unfolded(mask, f"{name}.mask.by_head"))
            shape = (*sizes(query)[:3], attention.value_dim)
            return nodes.op("Attention", *inputs, name=f"{name}.mixed", shape=shape, scale=attention.scale), written
        query = self._folded(query, attention.queries_per_kv_head, f"{name}.query")
        inputs = (query, written.key, written.value, mask)
        shape = (*sizes(query)[:3], attention.value_dim)
        mixed = nodes.op("Attention", *inputs, name=f"{name}.by_group.mixed", shape=shape, scale=attention.scale)
        to = nodes.integers(-1, attention.num_heads, 0, attention.value_dim)
        shape = (BATCH, attention.num_heads, SEQUENCE, attention.value_dim)
        return nodes.op("Reshape", mixed, to, name=f"{name}.mixed", shape=shape), written

    def _folded(self, x: ir.Value, each: int, name: str) -> ir.Value:
        """[batch, N·each, sequence, width] to [batch·N, each, sequence, width]."""
        width = sizes(x)[3]
        assert isinstance(width, int)
        shape = (self._rows, each, SEQUENCE, width)
        return self._nodes.op("Reshape", x, self._nodes.integers(-1, each, 0, width), name=name, shape=shape)

    def _unfolded(self, x: ir.Value, name: str) -> ir.Value:
        """[batch·N, 1, n, m] to [batch, N, n, m]: the same numbers in the same order."""
        heads, shape = self._attention.num_kv_heads, sizes(x)
        return self._nodes.op(
            "Reshape", x, self._nodes.integers(-1, heads, *(0, 0)), name=name, shape=(BATCH, heads, *shape[2:]), dtype=dtype_of(x)
        )

    def _new_state(self, heads: _Heads, key: ir.Value) -> ir.Value:
        """Of the new tokens, [batch·N, 1, sequence, 2]."""
        nodes, shape = self._nodes, (self._rows, 1, SEQUENCE, 2)
        columns = {SCORE: self._scores(heads, key), STORED: heads.stored}
        ordered, name = [columns[each] for each in sorted(columns)], f"{self._name}.state.new"
        return nodes.op("Concat", *ordered, name=name, shape=shape, dtype=STATE_DTYPE, axis=-1)

    def _scores(self, heads: _Heads, key: ir.Value) -> ir.Value:
        """[batch·N, 1, sequence, 1]."""
        nodes, policy, name, shape = (
            self._nodes,
            self._shared.eviction.policy,
            f"{self._name}.score",
            (self._rows, 1, SEQUENCE, 1),
        )
        if policy == "window":
            return nodes.op(
                "Sub", nodes.number("evict.one", 1.0, STATE_DTYPE), heads.stored, name=name, shape=shape, dtype=STATE_DTYPE
            )
        if policy == "random":
            return self._chances(name, shape)
        wide = key if nodes.dtype == STATE_DTYPE else nodes.cast(key, STATE_DTYPE, f"{name}.key")
        square = nodes.op("Mul", wide, wide, name=f"{name}.square", dtype=STATE_DTYPE)
        axes = nodes.integers(-1)
        total = nodes.op("ReduceSum", square, axes, name=f"{name}.sum", shape=shape, dtype=STATE_DTYPE, keepdims=1)
        norm = nodes.op("Sqrt", total, name=f"{name}.norm", dtype=STATE_DTYPE)
        return nodes.op("Mul", norm, heads.later, name=name, dtype=STATE_DTYPE)

    def _chances(self, name: str, shape: tuple[int | str, ...]) -> ir.Value:
        nodes, shared, count = self._nodes, self._shared, self._attention.num_kv_heads
        offsets = random_offsets(self._index, count, shared.capacity)
        row = nodes.op(
            "Unsqueeze", shared.positions, nodes.integers(1), name=f"{name}.positions", shape=(BATCH, 1, SEQUENCE), dtype="int64"
        )
        begins = nodes.constant(f"{name}.offsets", offsets[None, :, None])
        at = nodes.op("Add", row, begins, name=f"{name}.at", shape=(BATCH, count, SEQUENCE), dtype="int64")
        numbers = nodes.constant("evict.chances", random_scores(shared.capacity))
        drawn = nodes.op("Gather", numbers, at, name=f"{name}.drawn", shape=sizes(at), dtype=STATE_DTYPE, axis=0)
        drawn = nodes.op("Unsqueeze", drawn, nodes.integers(3), name=f"{name}.column", shape=(*sizes(at), 1), dtype=STATE_DTYPE)
        return nodes.op("Reshape", drawn, nodes.integers(-1, 1, 0, 1), name=name, shape=shape, dtype=STATE_DTYPE)

    def _slot(self, heads: _Heads, state: ir.Value) -> ir.Value:
        """The slot of the first new token, int64 [batch·N]: after those in use, or where the highest priority is.

        Several tokens are written from there on: whoever calls the graph with them has made room for all.
        """
        nodes, name, eviction = self._nodes, f"{self._name}.slot", self._shared.eviction
        shape = (self._rows, 1, BUDGET, 1)

        def op(kind: str, *inputs: ir.Value, name: str, dtype: str = "bool") -> ir.Value:
            return nodes.op(kind, *inputs, name=name, shape=shape, dtype=dtype)

        def number(label: str, value: float) -> ir.Value:
            return nodes.number(f"evict.{label}", value, STATE_DTYPE)

        score, stored = (
            column(nodes, state, which, f"{name}.{label}") for which, label in ((SCORE, "score"), (STORED, "stored"))
        )
        recent = nodes.op("Sub", heads.first, number("recent", eviction.protect_recent), name=f"{name}.recent", dtype=STATE_DTYPE)
        old = op("LessOrEqual", stored, recent, name=f"{name}.old")
        late = op("Greater", stored, number("sinks", eviction.protect_first), name=f"{name}.late")
        evictable = op("And", old, late, name=f"{name}.evictable")
        ranks = op("Where", evictable, score, number("spared", -NEVER), name=f"{name}.ranks", dtype=STATE_DTYPE)
        if self._attention.window is not None:
            window = number(f"window_{self._attention.window}", self._attention.window)
            edge = nodes.op("Sub", heads.first, window, name=f"{name}.edge", dtype=STATE_DTYPE)
            unseen = op("LessOrEqual", stored, edge, name=f"{name}.unseen")
            age = op("Sub", number("latest", LATEST), stored, name=f"{name}.age", dtype=STATE_DTYPE)
            before = op("Mul", age, number("before_all", UNSEEN), name=f"{name}.before_all", dtype=STATE_DTYPE)
            ranks = op("Where", unseen, before, ranks, name=f"{name}.ranks.unseen", dtype=STATE_DTYPE)
        same = op("Equal", stored, heads.first, name=f"{name}.same")
        ranks = op("Where", same, number("again", NEVER), ranks, name=f"{name}.ranks.again", dtype=STATE_DTYPE)
        row = (self._rows, 1, 1, 1)
        highest = nodes.op("ArgMax", ranks, name=f"{name}.highest", shape=row, dtype="int64", axis=2, keepdims=1)
        taken = nodes.cast(highest, STATE_DTYPE, f"{name}.taken")
        chosen = nodes.op("Where", heads.has_room, heads.filled, taken, name=f"{name}.chosen", shape=row, dtype=STATE_DTYPE)
        flat = nodes.op("Reshape", chosen, nodes.integers(-1), name=f"{name}.flat", shape=(self._rows,), dtype=STATE_DTYPE)
        return nodes.cast(flat, "int64", name)

    def _mask(self, heads: _Heads, state: ir.Value) -> ir.Value:
        """Bool [batch·N, 1, sequence, slots], or ALiBi's bias [batch·N, H/N, sequence, slots]."""
        nodes, name, window, shape = self._nodes, f"{self._name}.mask", self._attention.window, (self._rows, 1, SEQUENCE, BUDGET)
        held, row = column(nodes, state, STORED, f"{name}.held"), (self._rows, 1, 1, BUDGET)
        stored = nodes.op("Reshape", held, nodes.integers(0, 1, 1, -1), name=f"{name}.row", shape=row, dtype=STATE_DTYPE)
        zero = nodes.number("evict.zero", 0.0, STATE_DTYPE)
        taken = nodes.op("Greater", stored, zero, name=f"{name}.taken", dtype="bool")
        past = nodes.op("LessOrEqual", stored, heads.stored, name=f"{name}.causal", shape=shape, dtype="bool")
        visible = nodes.op("And", past, taken, name=f"{name}.visible", shape=shape, dtype="bool")
        if window is not None:
            width = nodes.number(f"evict.window_{window}", window, STATE_DTYPE)
            edge = nodes.op("Sub", heads.stored, width, name=f"{name}.edge", dtype=STATE_DTYPE)
            seen = nodes.op("Greater", stored, edge, name=f"{name}.in_window", shape=shape, dtype="bool")
            visible = nodes.op("And", visible, seen, name=f"{name}.visible_in_window", shape=shape, dtype="bool")
        if self._attention.alibi_slopes is None:
            return visible
        each = self._attention.queries_per_kv_head
        slopes = np.asarray(self._attention.alibi_slopes).astype(np.float32).reshape(self._attention.num_kv_heads, each)
        slope = self._shared.along_heads(slopes, (-1, each, 1, 1), f"{name}.slopes")
        distance = nodes.op("Sub", stored, heads.stored, name=f"{name}.distance", shape=shape, dtype=STATE_DTYPE)
        shape = (self._rows, each, SEQUENCE, BUDGET)
        bias = nodes.op("Mul", distance, slope, name=f"{name}.alibi", shape=shape, dtype=STATE_DTYPE)
        if nodes.dtype != STATE_DTYPE:
            bias = nodes.cast(bias, nodes.dtype, f"{name}.alibi.{nodes.dtype}")
        lowest = nodes.constant("mask.hidden", np.array(-largest(nodes.dtype), dtype=NUMPY_DTYPES[nodes.dtype]))
        return nodes.op("Where", visible, bias, lowest, name=f"{name}.bias", shape=shape)
