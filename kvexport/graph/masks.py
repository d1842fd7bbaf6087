"""Attention masks, shared by layers with the same window and slopes. Slot n holds position n."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from kvexport.bundle.graph_io import BATCH, CAPACITY, SEQUENCE
from kvexport.graph.nodes import NodeBuilder
from kvexport.graph.weights import NUMPY_DTYPES, largest_number

_COLUMN = (BATCH, 1, SEQUENCE, 1)
_FULL = (BATCH, 1, SEQUENCE, CAPACITY)


class Masks:
    """Masks of layers without eviction.

    Args:
        positions: positions of the new tokens, int64 [batch, sequence].
        cache: [batch, heads, capacity, width], of any layer.
    """

    def __init__(self, nodes: NodeBuilder, positions: ir.Value, cache: ir.Value) -> None:
        self._nodes = nodes
        self._visible: dict[int | None, ir.Value] = {}
        self._biases: dict[tuple[int | None, bytes], ir.Value] = {}
        self._relative: ir.Value | None = None
        shape = nodes.op("Shape", cache, name="mask.cache_shape", shape=(4,), dtype="int64")
        capacity = nodes.op(
            "Gather", shape, nodes.integer(2), name="mask.capacity", shape=(), dtype="int64", axis=0
        )
        slots = (nodes.integer(0), capacity, nodes.integer(1))
        self._slots = nodes.op("Range", *slots, name="mask.slots", shape=(CAPACITY,), dtype="int64")
        axes = nodes.integers(1, 3)
        self._positions = nodes.op(
            "Unsqueeze", positions, axes, name="mask.positions", shape=_COLUMN, dtype="int64"
        )

    def visible(self, window: int | None) -> ir.Value:
        """Bool [batch, 1, sequence, capacity], true where position - window < slot <= position."""
        if window not in self._visible:
            self._visible[window] = self._causal() if window is None else self._windowed(window)
        return self._visible[window]

    def bias(self, window: int | None, slopes: NDArray[np.float32], name: str) -> ir.Value:
        """ALiBi bias slope · (slot - position), and the lowest finite number where a slot is hidden.

        It is computed in float32 and relative to the token's position, so that its precision does not depend
        on the position. The number for hidden slots is finite because tiled attention kernels make NaN of a
        tile of infinities.

        Args:
            slopes: [heads].

        Returns:
            [batch, heads, sequence, capacity] in the graph's dtype.
        """
        key = (window, slopes.tobytes())
        if key in self._biases:
            return self._biases[key]
        nodes, shape, visible = self._nodes, (BATCH, len(slopes), SEQUENCE, CAPACITY), self.visible(window)
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
            "LessOrEqual", self._slots, self._positions, name="mask.causal", shape=_FULL, dtype="bool"
        )

    def _windowed(self, window: int) -> ir.Value:
        nodes, name, causal = self._nodes, f"mask.window_{window}", self.visible(None)
        before = nodes.op("Sub", self._positions, nodes.integer(window), name=f"{name}.before", dtype="int64")
        recent = nodes.op("Greater", self._slots, before, name=f"{name}.recent", shape=_FULL, dtype="bool")
        return nodes.op("And", causal, recent, name=name, dtype="bool")

    def _distance(self) -> ir.Value:
        if self._relative is None:
            nodes = self._nodes
            relative = nodes.op(
                "Sub", self._slots, self._positions, name="mask.relative", shape=_FULL, dtype="int64"
            )
            self._relative = nodes.cast(relative, "float32", "mask.relative.float32")
        return self._relative
