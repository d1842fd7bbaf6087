"""Attention masks, shared by layers with the same slots, window and slopes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from kvexport.bundle.graph_io import BATCH, SEQUENCE
from kvexport.graph.nodes import NodeBuilder, sizes
from kvexport.graph.weights import NUMPY_DTYPES, largest_number


class Masks:
    """Masks over the slots of layers without eviction."""

    def __init__(self, nodes: NodeBuilder, positions: ir.Value, slots: ir.Value, name: str) -> None:
        """
        Args:
            nodes: nodes of the graph.
            positions: positions of the new tokens, int64 [batch, 1, sequence, 1].
            slots: the position in each slot, int64 [slots] or [batch, 1, 1, slots].
            name: prefix of the names of the nodes.
        """
        self._nodes, self._positions, self._slots, self._name = nodes, positions, slots, name
        self._axis = sizes(slots)[-1]
        self._full = (BATCH, 1, SEQUENCE, self._axis)
        self._visible: dict[int | None, ir.Value] = {}
        self._biases: dict[tuple[int | None, bytes], ir.Value] = {}
        self._relative: ir.Value | None = None

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
            self._positions,
            name=f"{self._name}.causal",
            shape=self._full,
            dtype="bool",
        )

    def _windowed(self, window: int) -> ir.Value:
        nodes, name, causal = self._nodes, f"{self._name}.window_{window}", self.visible(None)
        before = nodes.op("Sub", self._positions, nodes.integer(window), name=f"{name}.before", dtype="int64")
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
                self._positions,
                name=f"{self._name}.relative",
                shape=self._full,
                dtype="int64",
            )
            self._relative = nodes.cast(relative, "float32", f"{self._name}.relative.float32")
        return self._relative
