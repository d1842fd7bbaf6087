"""Rotary position embedding in the half-split layout: tables over all positions, and RotaryEmbedding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from kvexport.graph.nodes import NodeBuilder, sizes
from kvexport.model.decoder import Rope


class RotaryTables:
    """The tables of a decoder, one pair for each RoPE that its layers use."""

    def __init__(self, nodes: NodeBuilder, positions: ir.Value, capacity: int) -> None:
        self._nodes, self._positions, self._capacity = nodes, positions, capacity
        self._rotaries: dict[bytes, Rotary] = {}

    def of(self, rope: Rope) -> Rotary:
        """The tables of a RoPE."""
        parts = (rope.inv_freq,) if rope.magnitude is None else (rope.inv_freq, rope.magnitude)
        key = b"".join(np.asarray(part).tobytes() for part in parts)
        if key not in self._rotaries:
            label = f"rope{len(self._rotaries) or ''}"
            self._rotaries[key] = Rotary(self._nodes, self._positions, rope, self._capacity, label)
        return self._rotaries[key]


class Rotary:
    """Rotate queries and keys by cos and sin tables [capacity, head_dim/2], written when first used."""

    def __init__(
        self, nodes: NodeBuilder, positions: ir.Value, rope: Rope, capacity: int, label: str
    ) -> None:
        """`label`: prefix of the names of the tables."""
        self._nodes, self._positions, self._rope, self._capacity = nodes, positions, rope, capacity
        self._label = label
        self._tables: tuple[ir.Value, ir.Value] | None = None
        self._rows: list[ir.Value] = []
        self._selections: dict[tuple[int, ...], tuple[ir.Value, ir.Value]] = {}

    def rotate(self, x: ir.Value, name: str, frequencies: NDArray[np.int64] | None = None) -> ir.Value:
        """Rotate x [batch, heads, sequence, width] as `kvexport.model.rotation.rotate` does.

        Args:
            frequencies: [width/2], the column of the tables for each pair of numbers; None: column i for pair
                i.
        """
        if self._tables is None:
            self._tables = (self._table("cos", np.cos), self._table("sin", np.sin))
        if frequencies is None:
            return self._nodes.op("RotaryEmbedding", x, *self._tables, self._positions, name=name)
        return self._nodes.op("RotaryEmbedding", x, *self._select(frequencies), name=name)

    def _select(self, frequencies: NDArray[np.int64]) -> tuple[ir.Value, ir.Value]:
        """Rows of both tables at the new tokens' positions and the given columns, [batch, sequence, width/2].

        They are gathered in each step: tables of selected columns for every layer would cost more memory than
        they save time.
        """
        key = tuple(frequencies.tolist())
        if key not in self._selections:
            assert self._tables is not None
            label, (batch, sequence) = f"{self._label}.choice{len(self._selections)}", sizes(self._positions)
            if not self._rows:
                shape = (batch, sequence, sizes(self._tables[0])[1])
                self._rows = [
                    self._nodes.op(
                        "Gather", table, self._positions, name=f"{table.name}.rows", shape=shape, axis=0
                    )
                    for table in self._tables
                ]
            columns = self._nodes.integers(*key)
            shape = (batch, sequence, len(key))
            cos, sin = (
                self._nodes.op("Gather", rows, columns, name=f"{label}.{part}", shape=shape, axis=2)
                for rows, part in zip(self._rows, ("cos", "sin"), strict=True)
            )
            self._selections[key] = cos, sin
        return self._selections[key]

    def _table(self, name: str, function: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> ir.Value:
        """A table [capacity, head_dim/2]. Angles are float32 products for every dtype, as in training."""
        positions = np.arange(self._capacity, dtype=np.float32)
        angles = positions[:, None] * np.asarray(self._rope.inv_freq).astype(
            np.float32
        )  # [capacity, head_dim/2]
        values = function(angles)
        if self._rope.magnitude is not None:
            values = values * np.asarray(self._rope.magnitude)
        return self._nodes.weight(f"{self._label}.{name}", values)
