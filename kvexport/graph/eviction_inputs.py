"""Values that layers with eviction share: positions, slots in use, and the state of the slots.

Heads lie along the batch axis: [batch·N, 1, ...] for N KV heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kvexport.bundle.graph_io import BATCH, SEQUENCE, heads_along_batch
from kvexport.eviction.config import LATER, POSITION_PLUS_ONE, Eviction
from kvexport.graph.nodes import NodeBuilder, Nodes, sizes

STATE_DTYPE = "float32"


@dataclass(frozen=True)
class HeadInputs:
    """Values that layers of N KV heads share, for each head of the batch; float32, except `has_room`.

    Attributes:
        position_plus_one: [batch·N, 1, sequence, 1], of each new token.
        first: [batch·N, 1, 1, 1], position_plus_one of the first new token.
        filled: [batch·N, 1, 1, 1], slots in use before this call.
        has_room: bool [batch·N, 1, 1, 1], whether a slot is free.
        later: [batch·N, 1, sequence, 1], the factor of key norms that breaks ties by position; None: the
            policy uses no norms.
    """

    position_plus_one: ir.Value
    first: ir.Value
    filled: ir.Value
    has_room: ir.Value
    later: ir.Value | None


class EvictionInputs:
    """Values that all layers with eviction share, made once for each number of KV heads."""

    def __init__(
        self,
        nodes: NodeBuilder,
        eviction: Eviction,
        capacity: int,
        positions: ir.Value,
        write_indices: ir.Value,
    ) -> None:
        """
        Args:
            nodes: nodes of the graph.
            eviction: policy and budget.
            capacity: the largest number of tokens of a sequence.
            positions: positions of the new tokens, int64 [batch, sequence].
            write_indices: int64 [batch], slots in use before this call.
        """
        self.nodes, self.eviction, self.capacity = nodes, eviction, capacity
        self.positions, self._write_indices = positions, write_indices
        self._shared: dict[int, HeadInputs] = {}

    def for_heads(self, count: int, state: ir.Value) -> HeadInputs:
        """Values for layers of `count` KV heads; `state` is the state of any of these layers."""
        if count not in self._shared:
            self._shared[count] = self._make(count, state)
        return self._shared[count]

    def _make(self, count: int, state: ir.Value) -> HeadInputs:
        nodes, name, rows = self.nodes, f"evict.{count}_heads", heads_along_batch(count)
        one = nodes.op("Add", self.positions, nodes.integer(1), name=f"{name}.next", dtype="int64")
        shape = (BATCH, 1, SEQUENCE, 1)
        column = nodes.op(
            "Unsqueeze", one, nodes.integers(1, 3), name=f"{name}.column", shape=shape, dtype="int64"
        )
        positions = self._repeat(column, count, f"{name}.stored")
        rows_of_one = (rows, 1, 1, 1)
        begin, end, axis = (nodes.integers(each) for each in (0, 1, 2))
        first = nodes.op(
            "Slice", positions, begin, end, axis, name=f"{name}.first", shape=rows_of_one, dtype=STATE_DTYPE
        )
        axes = nodes.integers(1, 2, 3)
        used = nodes.op(
            "Unsqueeze", self._write_indices, axes, name=f"{name}.used", shape=(BATCH, 1, 1, 1), dtype="int64"
        )
        filled = self._repeat(used, count, f"{name}.filled")
        has_room = nodes.op(
            "Less", filled, self._num_slots(state, name), name=f"{name}.has_room", dtype="bool"
        )
        later = self._later(positions, name) if self.eviction.policy in ("l2-norm", "keep-high") else None
        return HeadInputs(positions, first, filled, has_room, later)

    def _num_slots(self, state: ir.Value, name: str) -> ir.Value:
        """The number of slots, float32 [batch·N, 1, 1, 1].

        They are counted in the state: with Shape, TensorRT-RTX 1.7.1 ends in a segmentation fault.
        """
        nodes = self.nodes
        positions = state_row(nodes, state, POSITION_PLUS_ONE, f"{name}.state")
        zero = nodes.number("evict.zero", 0.0, STATE_DTYPE)
        exists = nodes.op("GreaterOrEqual", positions, zero, name=f"{name}.there", dtype="bool")
        each = nodes.cast(exists, STATE_DTYPE, f"{name}.each_slot")
        shape, axes = (sizes(state)[0], 1, 1, 1), nodes.integers(3)
        return nodes.op(
            "ReduceSum", each, axes, name=f"{name}.slots", shape=shape, dtype=STATE_DTYPE, keepdims=1
        )

    def _later(self, positions: ir.Value, name: str) -> ir.Value:
        """Factors of the key norms: 1 - later for the policy l2-norm, -(1 + later) for keep-high."""
        nodes, sign = self.nodes, -1.0 if self.eviction.policy == "l2-norm" else 1.0
        later = nodes.op(
            "Mul",
            positions,
            nodes.number("evict.step", LATER, STATE_DTYPE),
            name=f"{name}.later",
            dtype=STATE_DTYPE,
        )
        later = nodes.op(
            "Add",
            later,
            nodes.number("evict.sign", sign, STATE_DTYPE),
            name=f"{name}.signed",
            dtype=STATE_DTYPE,
        )
        return nodes.op("Neg", later, name=f"{name}.factor", dtype=STATE_DTYPE)

    def along_heads(self, values: np.ndarray, shape: tuple[int, ...], name: str) -> ir.Value:
        """Repeat a constant [N, ...] for each sequence: [batch·N, ...], in `shape`, which starts with -1."""
        nodes, count = self.nodes, len(values)
        ones = (1,) * (values.ndim - 1)
        zero = nodes.op("Sub", self._write_indices, self._write_indices, name=f"{name}.zero", dtype="int64")
        zero = nodes.cast(zero, STATE_DTYPE, f"{name}.zero.{STATE_DTYPE}")
        axes = nodes.integers(*range(1, values.ndim + 1))
        column = nodes.op(
            "Unsqueeze", zero, axes, name=f"{name}.column", shape=(BATCH, 1, *ones), dtype=STATE_DTYPE
        )
        whole = nodes.op(
            "Add",
            column,
            nodes.constant(f"{name}.values", values[None]),
            name=f"{name}.each",
            shape=(BATCH, *values.shape),
            dtype=STATE_DTYPE,
        )
        rows = heads_along_batch(count)
        return nodes.op(
            "Reshape", whole, nodes.integers(*shape), name=name, shape=(rows, *shape[1:]), dtype=STATE_DTYPE
        )

    def _repeat(self, x: ir.Value, count: int, name: str) -> ir.Value:
        """Repeat x int64 [batch, 1, n, 1] for each of `count` heads: float32 [batch·N, 1, n, 1]."""
        nodes, (_, _, length, _) = self.nodes, sizes(x)
        wide, zeros = (
            nodes.cast(x, STATE_DTYPE, f"{name}.{STATE_DTYPE}"),
            np.zeros((1, count, 1, 1), STATE_DTYPE),
        )
        heads = nodes.constant(f"{name}.heads", zeros)
        repeated = nodes.op(
            "Add", wide, heads, name=f"{name}.each", shape=(BATCH, count, length, 1), dtype=STATE_DTYPE
        )
        shape = (heads_along_batch(count), 1, length, 1)
        return nodes.op(
            "Reshape", repeated, nodes.integers(-1, 1, 0, 1), name=name, shape=shape, dtype=STATE_DTYPE
        )


def state_row(nodes: Nodes, state: ir.Value, which: int, name: str) -> ir.Value:
    """Column `which` of a state [rows, 1, slots, 2], as a row [rows, 1, 1, slots].

    With Slice: with Gather, TensorRT-RTX 1.7.1 ends in a segmentation fault. Slots are the last axis because
    ONNX Runtime's CPU kernels compare with a scalar element by element if the last axis is 1.
    """
    begin, end, axis = (nodes.integers(each) for each in (which, which + 1, 3))
    rows, _, slots, _ = sizes(state)
    column = nodes.op(
        "Slice", state, begin, end, axis, name=f"{name}.column", shape=(rows, 1, slots, 1), dtype=STATE_DTYPE
    )
    to = nodes.integers(0, 1, 1, -1)
    return nodes.op("Reshape", column, to, name=name, shape=(rows, 1, 1, slots), dtype=STATE_DTYPE)
