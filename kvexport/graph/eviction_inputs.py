"""What layers that evict share: positions and slots in use, once for each KV head, and how a slot's state is read.

Knows that heads lie along the batch, [batch·N, 1, ...]; must not know which token goes, nor attention.
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
    """What layers of N KV heads share, once for each head of the batch; all float32 but `has_room`."""

    stored: ir.Value  # [batch·N, 1, sequence, 1], the new tokens' positions + 1
    first: ir.Value  # [batch·N, 1, 1, 1], the first one's
    filled: ir.Value  # [batch·N, 1, 1, 1], slots in use before this call
    has_room: ir.Value  # bool [batch·N, 1, 1, 1], whether those are not all
    later: (
        ir.Value | None
    )  # [batch·N, 1, sequence, 1], what norms are multiplied with; None: the policy has none


class EvictionInputs:
    """What the layers of a decoder share: positions, slots in use, numbers of chance."""

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
            capacity: positions there are.
            positions: of the new tokens, [batch, sequence].
            write_indices: slots in use before them [batch]; as many as there are slots: all.
        """
        self.nodes, self.eviction, self.capacity = nodes, eviction, capacity
        self.positions, self._write_indices = positions, write_indices
        self._shared: dict[int, HeadInputs] = {}

    def heads(self, count: int, state: ir.Value) -> HeadInputs:
        """For layers of `count` KV heads; `state` is of any of them."""
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
        stored = self._along(column, count, f"{name}.stored")
        rows_of_one = (rows, 1, 1, 1)
        begin, end, axis = (nodes.integers(each) for each in (0, 1, 2))
        first = nodes.op(
            "Slice", stored, begin, end, axis, name=f"{name}.first", shape=rows_of_one, dtype=STATE_DTYPE
        )
        axes = nodes.integers(1, 2, 3)
        used = nodes.op(
            "Unsqueeze", self._write_indices, axes, name=f"{name}.used", shape=(BATCH, 1, 1, 1), dtype="int64"
        )
        filled = self._along(used, count, f"{name}.filled")
        has_room = nodes.op("Less", filled, self._slots(state, name), name=f"{name}.has_room", dtype="bool")
        later = self._later(stored, name) if self.eviction.policy in ("l2-norm", "keep-high") else None
        return HeadInputs(stored, first, filled, has_room, later)

    def _slots(self, state: ir.Value, name: str) -> ir.Value:
        """How many slots there are, [batch·N, 1, 1, 1], counted: of a Shape TensorRT-RTX 1.7.1 dies of a segmentation fault."""
        nodes = self.nodes
        stored = row_of(nodes, state, POSITION_PLUS_ONE, f"{name}.state")
        zero = nodes.number("evict.zero", 0.0, STATE_DTYPE)
        there = nodes.op("GreaterOrEqual", stored, zero, name=f"{name}.there", dtype="bool")
        each = nodes.cast(there, STATE_DTYPE, f"{name}.each_slot")
        shape, axes = (sizes(state)[0], 1, 1, 1), nodes.integers(3)
        return nodes.op(
            "ReduceSum", each, axes, name=f"{name}.slots", shape=shape, dtype=STATE_DTYPE, keepdims=1
        )

    def _later(self, stored: ir.Value, name: str) -> ir.Value:
        """1 - later, or -(1 + later)."""
        nodes, sign = self.nodes, -1.0 if self.eviction.policy == "l2-norm" else 1.0
        later = nodes.op(
            "Mul",
            stored,
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
        """A constant [N, ...] once for each sequence: [batch·N, ...] in `shape`, whose first size is -1."""
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

    def _along(self, x: ir.Value, count: int, name: str) -> ir.Value:
        """x int64 [batch, 1, n, 1], the same for every head, as float32 [batch·N, 1, n, 1]."""
        nodes, (_, _, length, _) = self.nodes, sizes(x)
        wide, zeros = (
            nodes.cast(x, STATE_DTYPE, f"{name}.{STATE_DTYPE}"),
            np.zeros((1, count, 1, 1), STATE_DTYPE),
        )
        heads = nodes.constant(f"{name}.heads", zeros)
        spread = nodes.op(
            "Add", wide, heads, name=f"{name}.each", shape=(BATCH, count, length, 1), dtype=STATE_DTYPE
        )
        shape = (heads_along_batch(count), 1, length, 1)
        return nodes.op(
            "Reshape", spread, nodes.integers(-1, 1, 0, 1), name=name, shape=shape, dtype=STATE_DTYPE
        )


def row_of(nodes: Nodes, state: ir.Value, which: int, name: str) -> ir.Value:
    """[rows, 1, 1, slots] of a state [rows, 1, slots, 2].

    By Slice: of Gather TensorRT-RTX 1.7.1 dies of a segmentation fault. Slots come last, since ONNX Runtime's CPU compares
    with a scalar element by element where the last axis is 1.
    """
    begin, end, axis = (nodes.integers(each) for each in (which, which + 1, 3))
    rows, _, slots, _ = sizes(state)
    column = nodes.op(
        "Slice", state, begin, end, axis, name=f"{name}.column", shape=(rows, 1, slots, 1), dtype=STATE_DTYPE
    )
    to = nodes.integers(0, 1, 1, -1)
    return nodes.op("Reshape", column, to, name=name, shape=(rows, 1, 1, slots), dtype=STATE_DTYPE)
