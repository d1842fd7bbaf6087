"""Slots of caches without eviction: the position in each, where a call writes, and the masks over them.

Slot n holds position n, or, in a ring (`kvexport.bundle.graph_io.ring_of`), the last position that is n
modulo the number of slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from kvexport.bundle.graph_io import BATCH, SEQUENCE
from kvexport.graph.masks import Masks
from kvexport.graph.nodes import NodeBuilder, sizes

NEVER = 2**30  # a position after all others, so that every mask hides the slot


@dataclass(frozen=True)
class Slots:
    """The slots of caches of one kind.

    Attributes:
        masks: masks over these slots.
        write_indices: int64 [batch], the slot of each sequence's first new token.
    """

    masks: Masks
    write_indices: ir.Value


def ring_name(window: int | None) -> str:
    """Prefix of the names of the nodes of a ring; None: of slots that hold all tokens."""
    return "mask" if window is None else f"ring_{window}"


class SlotsBuilder:
    """Make the slots of each kind of cache, with the first layer that has it."""

    def __init__(self, nodes: NodeBuilder, positions: ir.Value, write_indices: ir.Value | None) -> None:
        """
        Args:
            nodes: nodes of the graph.
            positions: positions of the new tokens, int64 [batch, sequence].
            write_indices: the first of them, int64 [batch]; None: the graph has no such input.
        """
        self._nodes, self._positions, self._first_position = nodes, positions, write_indices
        self._column: ir.Value | None = None
        self._last_position: ir.Value | None = None
        self._made: dict[int | None, Slots] = {}

    def of(self, ring: int | None, cache: ir.Value) -> Slots:
        """The slots of caches of one kind.

        Behind rings, a cache of all tokens has the form of a ring that never wraps: TensorRT-RTX 1.7.1 does
        not build both forms in this order.

        Args:
            ring: the window of a ring; None: not a ring.
            cache: [batch, heads, slots, width], of any layer of this kind.
        """
        if ring not in self._made:
            is_linear = ring is None and not self._made
            self._made[ring] = self._linear(cache) if is_linear else self._ring(ring, cache)
        return self._made[ring]

    def _linear(self, cache: ir.Value) -> Slots:
        """Slots that hold the positions 0, 1, ..."""
        _, slots = self._numbered(cache, "mask", ("capacity", "slots"))
        return Slots(Masks(self._nodes, self._by_row(), slots, "mask"), self._first())

    def _ring(self, window: int | None, cache: ir.Value) -> Slots:
        """Slots of a ring.

        With the last new token at position p, slot n of R holds position p - ((p - n) mod R), or none if that
        is negative.
        """
        nodes, name, axis = self._nodes, ring_name(window), sizes(cache)[2]
        row = (BATCH, 1, 1, axis)
        count, numbers = self._numbered(cache, name, ("count", "numbers"))
        index = nodes.op("Mod", self._first(), count, name=f"{name}.index", dtype="int64")
        last = self._last()
        # The dividend p - n + R is positive, so that the sign convention of Mod does not matter.
        ahead = nodes.op("Sub", count, numbers, name=f"{name}.ahead", shape=(axis,), dtype="int64")
        dividend = nodes.op("Add", last, ahead, name=f"{name}.dividend", shape=row, dtype="int64")
        age = nodes.op("Mod", dividend, count, name=f"{name}.age", shape=row, dtype="int64")
        newest = nodes.op("Sub", last, age, name=f"{name}.newest", shape=row, dtype="int64")
        zero, never = nodes.integer(0), nodes.integer(NEVER)
        written = nodes.op("GreaterOrEqual", newest, zero, name=f"{name}.is_written", shape=row, dtype="bool")
        held = nodes.op("Where", written, newest, never, name=f"{name}.held", shape=row, dtype="int64")
        return Slots(Masks(nodes, self._by_row(), held, name), index)

    def _numbered(self, cache: ir.Value, name: str, labels: tuple[str, str]) -> tuple[ir.Value, ir.Value]:
        """The number of slots of a cache, int64 [], and the numbers 0, 1, ... of the slots, int64 [slots]."""
        nodes = self._nodes
        shape = nodes.op("Shape", cache, name=f"{name}.cache_shape", shape=(4,), dtype="int64")
        count = nodes.op(
            "Gather", shape, nodes.integer(2), name=f"{name}.{labels[0]}", shape=(), dtype="int64", axis=0
        )
        limits, axis = (nodes.integer(0), count, nodes.integer(1)), sizes(cache)[2]
        return count, nodes.op("Range", *limits, name=f"{name}.{labels[1]}", shape=(axis,), dtype="int64")

    def _by_row(self) -> ir.Value:
        """Positions of the new tokens, int64 [batch, 1, sequence, 1]."""
        if self._column is None:
            shape, axes = (BATCH, 1, SEQUENCE, 1), self._nodes.integers(1, 3)
            self._column = self._nodes.op(
                "Unsqueeze", self._positions, axes, name="mask.positions", shape=shape, dtype="int64"
            )
        return self._column

    def _first(self) -> ir.Value:
        """The first new position, int64 [batch]."""
        if self._first_position is None:
            self._first_position = self._position(0, "first_position")
        return self._first_position

    def _last(self) -> ir.Value:
        """The last new position, int64 [batch, 1, 1, 1]."""
        if self._last_position is None:
            last, axes = self._position(-1, "last_position"), self._nodes.integers(1, 2, 3)
            self._last_position = self._nodes.op(
                "Unsqueeze", last, axes, name="last_position.column", shape=(BATCH, 1, 1, 1), dtype="int64"
            )
        return self._last_position

    def _position(self, index: int, name: str) -> ir.Value:
        nodes = self._nodes
        return nodes.op(
            "Gather",
            self._positions,
            nodes.integer(index),
            name=name,
            shape=(BATCH,),
            dtype="int64",
            axis=1,
        )
