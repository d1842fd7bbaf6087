"""Slots and attention masks of layers without eviction, shared by layers with the same window and slopes.

Slot n holds position n, or, in a ring (`kvexport.bundle.graph_io.ring_of`), the last position that is n
modulo the number of slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from kvexport.bundle.graph_io import BATCH, SEQUENCE, ring_axis
from kvexport.graph.nodes import NodeBuilder, sizes
from kvexport.graph.weights import NUMPY_DTYPES, largest_number

_COLUMN = (BATCH, 1, SEQUENCE, 1)
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


def linear_slots(
    nodes: NodeBuilder, cache: ir.Value, positions: ir.Value, first: ir.Value, other: Slots | None
) -> Slots:
    """Slots that hold the positions 0, 1, ...

    Args:
        nodes: nodes of the graph.
        cache: [batch, heads, capacity, width], of any layer with such a cache.
        positions: positions of the new tokens, int64 [batch, sequence].
        first: the first of them, int64 [batch].
        other: slots of another kind of the same graph; None: there are none yet.
    """
    _, slots = _numbered(nodes, cache, "mask", ("capacity", "slots"))
    return Slots(Masks(nodes, positions, slots, "mask", other), first)


def ring_slots(
    nodes: NodeBuilder,
    window: int,
    cache: ir.Value,
    positions: ir.Value,
    first: ir.Value,
    other: Slots | None,
) -> Slots:
    """Slots of a ring that holds a window; arguments as `linear_slots`.

    With the last new token at position p, slot n of R holds position p - ((p - n) mod R), or none if that is
    negative.
    """
    name, axis = f"ring_{window}", ring_axis(window)
    row = (BATCH, 1, 1, axis)
    count, numbers = _numbered(nodes, cache, name, ("slots", "numbers"))
    index = nodes.op("Mod", first, count, name=f"{name}.index", dtype="int64")
    last = nodes.op(
        "Gather", positions, nodes.integer(-1), name=f"{name}.last", shape=(BATCH,), dtype="int64", axis=1
    )
    last = nodes.op(
        "Unsqueeze",
        last,
        nodes.integers(1, 2, 3),
        name=f"{name}.last.column",
        shape=(BATCH, 1, 1, 1),
        dtype="int64",
    )
    # The dividend p - n + R is positive, so that the sign convention of Mod does not matter.
    ahead = nodes.op("Sub", count, numbers, name=f"{name}.ahead", shape=(axis,), dtype="int64")
    dividend = nodes.op("Add", last, ahead, name=f"{name}.dividend", shape=row, dtype="int64")
    age = nodes.op("Mod", dividend, count, name=f"{name}.age", shape=row, dtype="int64")
    newest = nodes.op("Sub", last, age, name=f"{name}.newest", shape=row, dtype="int64")
    written = nodes.op(
        "GreaterOrEqual", newest, nodes.integer(0), name=f"{name}.is_written", shape=row, dtype="bool"
    )
    held = nodes.op(
        "Where", written, newest, nodes.integer(NEVER), name=f"{name}.held", shape=row, dtype="int64"
    )
    return Slots(Masks(nodes, positions, held, name, other), index)


def _numbered(
    nodes: NodeBuilder, cache: ir.Value, name: str, labels: tuple[str, str]
) -> tuple[ir.Value, ir.Value]:
    """The number of slots of a cache, int64 [], and the numbers 0, 1, ... of the slots, int64 [slots]."""
    shape = nodes.op("Shape", cache, name=f"{name}.cache_shape", shape=(4,), dtype="int64")
    count = nodes.op(
        "Gather", shape, nodes.integer(2), name=f"{name}.{labels[0]}", shape=(), dtype="int64", axis=0
    )
    limits = (nodes.integer(0), count, nodes.integer(1))
    axis = sizes(cache)[2]
    return count, nodes.op("Range", *limits, name=f"{name}.{labels[1]}", shape=(axis,), dtype="int64")


class Masks:
    """Masks over the slots of layers without eviction.

    Attributes:
        positions: positions of the new tokens, int64 [batch, 1, sequence, 1].
    """

    def __init__(
        self, nodes: NodeBuilder, positions: ir.Value, slots: ir.Value, name: str, other: Slots | None
    ) -> None:
        """
        Args:
            nodes: nodes of the graph.
            positions: positions of the new tokens, int64 [batch, sequence].
            slots: the position in each slot, int64 [slots] or [batch, 1, 1, slots]; `NEVER` if it is empty.
            name: prefix of the names of the nodes.
            other: slots of another kind, whose `positions` are used.
        """
        self._nodes, self._slots, self._name = nodes, slots, name
        self._axis = sizes(slots)[-1]
        self._full = (BATCH, 1, SEQUENCE, self._axis)
        self._visible: dict[int | None, ir.Value] = {}
        self._biases: dict[tuple[int | None, bytes], ir.Value] = {}
        self._relative: ir.Value | None = None
        self.positions: ir.Value = (
            nodes.op(
                "Unsqueeze",
                positions,
                nodes.integers(1, 3),
                name=f"{name}.positions",
                shape=_COLUMN,
                dtype="int64",
            )
            if other is None
            else other.masks.positions
        )

    def visible(self, window: int | None) -> ir.Value:
        """Bool [batch, 1, sequence, slots]: position - window < the slot's position <= position."""
        if window not in self._visible:
            self._visible[window] = self._causal() if window is None else self._windowed(window)
        return self._visible[window]

    def bias(self, window: int | None, slopes: NDArray[np.float32], name: str) -> ir.Value:
        """ALiBi bias slope · (slot's position - position), and the lowest finite number where it is hidden.

        It is computed in float32 and relative to the token's position, so that its precision does not depend
        on the position. The number for hidden slots is finite because tiled attention kernels make NaN of a
        tile of infinities.

        Args:
            slopes: [heads].

        Returns:
            [batch, heads, sequence, slots] in the graph's dtype.
        """
        key = (window, slopes.tobytes())
        if key in self._biases:
            return self._biases[key]
        nodes, shape, visible = self._nodes, (BATCH, len(slopes), SEQUENCE, self._axis), self.visible(window)
        slope = nodes.constant(f"{name}.slopes", slopes.reshape(-1, 1, 1))
        lowest = nodes.constant(
            "mask.hidden", np.array(-largest_number(nodes.dtype), dtype=NUMPY_DTYPES[nodes.dtype])
        )
        bias = nodes.op("Mul", self._distance(), slope, name=f"{name}.float32", shape=shape, dtype="float32")
        if nodes.dtype != "float32":
            bias = nodes.cast(bias, nodes.dtype, f"{name}.{nodes.dtype}")
        self._biases[key] = nodes.op("Where", visible, bias, lowest, name=name, shape=shape)
        return self._biases[key]

    def _causal(self) -> ir.Value:
        return self._nodes.op(
            "LessOrEqual",
            self._slots,
            self.positions,
            name=f"{self._name}.causal",
            shape=self._full,
            dtype="bool",
        )

    def _windowed(self, window: int) -> ir.Value:
        nodes, name, causal = self._nodes, f"{self._name}.window_{window}", self.visible(None)
        before = nodes.op("Sub", self.positions, nodes.integer(window), name=f"{name}.before", dtype="int64")
        recent = nodes.op(
            "Greater", self._slots, before, name=f"{name}.recent", shape=self._full, dtype="bool"
        )
        return nodes.op("And", causal, recent, name=name, dtype="bool")

    def _distance(self) -> ir.Value:
        if self._relative is None:
            nodes = self._nodes
            relative = nodes.op(
                "Sub",
                self._slots,
                self.positions,
                name=f"{self._name}.relative",
                shape=self._full,
                dtype="int64",
            )
            self._relative = nodes.cast(relative, "float32", f"{self._name}.relative.float32")
        return self._relative
