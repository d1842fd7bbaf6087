"""Rotary positions in the graph: two tables over all positions, and the operator that applies them.

Knows the half-split layout; must not know what is rotated.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from kvexport.decoder import Rope
from kvexport.graph.nodes import NodeBuilder


class Rotary:
    """Rotates by cos and sin tables [capacity, head_dim/2], written when first used."""

    def __init__(self, nodes: NodeBuilder, positions: ir.Value, rope: Rope, capacity: int) -> None:
        self._nodes, self._positions, self._rope, self._capacity = nodes, positions, rope, capacity
        self._tables: tuple[ir.Value, ir.Value] | None = None

    def rotate(self, x: ir.Value, name: str) -> ir.Value:
        """[batch, heads, sequence, head_dim], rotated as `kvexport.reference.rotate` does."""
        if self._tables is None:
            self._tables = (self._table("rope.cos", np.cos), self._table("rope.sin", np.sin))
        return self._nodes.op("RotaryEmbedding", x, *self._tables, self._positions, name=name)

    def _table(self, name: str, function: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> ir.Value:
        """Angles are float32 products, as trained models see them, whatever the graph's dtype is."""
        positions = np.arange(self._capacity, dtype=np.float32)
        angles = positions[:, None] * np.asarray(self._rope.inv_freq).astype(np.float32)  # [capacity, head_dim/2]
        return self._nodes.weight(name, function(angles))
