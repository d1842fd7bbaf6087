"""Masks of layers with eviction over cached slots and new tokens, for a cache that the graph only reads.

They are made of the masks that `kvexport.graph.eviction_attention` makes.
"""

from __future__ import annotations

import onnx_ir as ir

from kvexport.bundle.graph_io import BUDGET, SEQUENCE
from kvexport.eviction.config import POSITION_PLUS_ONE
from kvexport.graph.eviction_inputs import STATE_DTYPE, state_row
from kvexport.graph.lowering.matches import AttentionMatch
from kvexport.graph.nodes import Nodes, sizes


class SlotMasks:
    """Extend the masks of the layers with eviction of one graph."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._numbers: ir.Value | None = None

    def add_new_tokens(self, match: AttentionMatch, state_write: ir.Node) -> ir.Value:
        """Compute the mask from the positions of the cached and the new tokens, not from the written state.

        Returns:
            the positions + 1 [batch·N, 1, 1, budget + sequence] that the mask is computed from; 0 for a slot
            that is empty or will be overwritten.

        Raises:
            PreconditionError: the mask or the slot is not computed as in `kvexport.graph.eviction_attention`.
        """
        past, new, _ = state_write.inputs
        assert past is not None and new is not None
        column, row = _position_readers(state_write)
        (positions,) = row.outputs
        nodes, name = Nodes(self._graph, STATE_DTYPE, before=column), str(positions.name)
        rows, _, _, _ = sizes(past)
        shape = (rows, 1, 1, BUDGET)
        cached_positions = state_row(nodes, past, POSITION_PLUS_ONE, f"{name}.old")
        slot, filled = _chosen_slot(match)
        numbers = self._slot_numbers(nodes, past)
        not_written = nodes.op(
            "Not",
            nodes.op("Equal", numbers, slot, name=f"{name}.written", shape=shape, dtype="bool"),
            name=f"{name}.not_written",
            dtype="bool",
        )
        used = nodes.op("Less", numbers, filled, name=f"{name}.used", shape=shape, dtype="bool")
        stays = nodes.op("And", used, not_written, name=f"{name}.stays", dtype="bool")
        empty = nodes.number("evict.zero", 0.0)
        cached_positions = nodes.op(
            "Where", stays, cached_positions, empty, name=f"{name}.staying", shape=shape
        )
        new_positions = state_row(nodes, new, POSITION_PLUS_ONE, f"{name}.new")
        shape = (rows, 1, 1, f"{BUDGET}+{SEQUENCE}")
        joined = nodes.op("Concat", cached_positions, new_positions, name=f"{name}.all", shape=shape, axis=3)
        ir.convenience.replace_all_uses_with(positions, joined)
        self._graph.remove((row, column), safe=True)
        return joined

    def _slot_numbers(self, nodes: Nodes, state: ir.Value) -> ir.Value:
        """The numbers 0, 1, ... of the slots, [1, 1, 1, budget], made once for all layers."""
        if self._numbers is None:
            shape = nodes.op("Shape", state, name="evict.state_shape", shape=(4,), dtype="int64")
            count = nodes.op(
                "Gather", shape, nodes.integer(2), name="evict.slots", shape=(), dtype="int64", axis=0
            )
            limits = (nodes.integer(0), count, nodes.integer(1))
            each = nodes.op("Range", *limits, name="evict.each_slot", shape=(BUDGET,), dtype="int64")
            each = nodes.op(
                "Unsqueeze",
                each,
                nodes.integers(0, 1, 2),
                name="evict.numbers.int64",
                shape=(1, 1, 1, BUDGET),
                dtype="int64",
            )
            self._numbers = nodes.cast(each, STATE_DTYPE, "evict.numbers")
        return self._numbers


def _position_readers(state_write: ir.Node) -> tuple[ir.Node, ir.Node]:
    """The Slice and the Reshape that read the positions of the written state."""
    nodes, written = [], state_write.outputs[0]
    for op_type in ("Slice", "Reshape"):
        readers = [use.node for use in written.uses()]
        if [node.op_type for node in readers] != [op_type]:
            raise ir.passes.PreconditionError(f"{state_write.name} is read by other nodes than the mask")
        nodes += readers
        written = readers[0].outputs[0]
    return nodes[0], nodes[1]


def _chosen_slot(match: AttentionMatch) -> tuple[ir.Value, ir.Value]:
    """The slot of the first new token, and the slots in use before it, float32 [batch·N, 1, 1, 1]."""
    node = match.write_indices.producer()
    for op_type in ("Cast", "Reshape"):
        if node is None or node.op_type != op_type or node.inputs[0] is None:
            raise ir.passes.PreconditionError(f"{match.write_indices.name} is not a slot selected by rank")
        node = node.inputs[0].producer()
    if node is None or node.op_type != "Where" or node.inputs[1] is None:
        raise ir.passes.PreconditionError(f"{match.write_indices.name} is not a slot selected by rank")
    return node.outputs[0], node.inputs[1]
