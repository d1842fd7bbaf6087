"""What the heads of a layer that evicts see where the graph cannot write the cache: old slots, and the new tokens beside them.

Knows how `kvexport.graph.eviction_attention` chooses a slot and makes a mask of the state; must not know how attention is spelled.
"""

from __future__ import annotations

import onnx_ir as ir

from kvexport.bundle.graph_io import BUDGET, SEQUENCE
from kvexport.eviction.config import POSITION_PLUS_ONE
from kvexport.graph.eviction_inputs import STATE_DTYPE, row_of
from kvexport.graph.lowering.matches import AttentionMatch
from kvexport.graph.nodes import Nodes, sizes


class SlotMasks:
    """Masks of the sites of one graph."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._numbers: ir.Value | None = None

    def see_new_tokens(self, match: AttentionMatch, state_write: ir.Node) -> ir.Value:
        """Let the site's mask be made of the positions in the old slots and then of the new ones, not of the written state.

        Returns:
            what it is made of now: position + 1, or 0 of a slot that is empty or to be overwritten,
            [batch·N, 1, 1, budget + sequence].

        Raises:
            PreconditionError: the mask or the slot is not made as `kvexport.graph.eviction_attention` does.
        """
        past, new, _ = state_write.inputs
        assert past is not None and new is not None
        column, row = _held(state_write)
        (held,) = row.outputs
        nodes, name = Nodes(self._graph, STATE_DTYPE, before=column), str(held.name)
        rows, _, _, _ = sizes(past)
        shape = (rows, 1, 1, BUDGET)
        stored = row_of(nodes, past, POSITION_PLUS_ONE, f"{name}.old")
        chosen, filled = _slot(match)
        numbers = self._numbered(nodes, past)
        other = nodes.op(
            "Not",
            nodes.op("Equal", numbers, chosen, name=f"{name}.written", shape=shape, dtype="bool"),
            name=f"{name}.not_written",
            dtype="bool",
        )
        used = nodes.op("Less", numbers, filled, name=f"{name}.used", shape=shape, dtype="bool")
        stays = nodes.op("And", used, other, name=f"{name}.stays", dtype="bool")
        empty = nodes.number("evict.zero", 0.0)
        stored = nodes.op("Where", stays, stored, empty, name=f"{name}.staying", shape=shape)
        to_come = row_of(nodes, new, POSITION_PLUS_ONE, f"{name}.new")
        shape = (rows, 1, 1, f"{BUDGET}+{SEQUENCE}")
        joined = nodes.op("Concat", stored, to_come, name=f"{name}.all", shape=shape, axis=3)
        ir.convenience.replace_all_uses_with(held, joined)
        self._graph.remove((row, column), safe=True)
        return joined

    def _numbered(self, nodes: Nodes, state: ir.Value) -> ir.Value:
        """0, 1, ... of the slots, [1, 1, 1, budget]; once for all layers."""
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


def _held(state_write: ir.Node) -> tuple[ir.Node, ir.Node]:
    """The Slice and the Reshape that read the positions of the written state."""
    nodes, written = [], state_write.outputs[0]
    for op_type in ("Slice", "Reshape"):
        readers = [use.node for use in written.uses()]
        if [node.op_type for node in readers] != [op_type]:
            raise ir.passes.PreconditionError(f"{state_write.name} is not read for a mask alone")
        nodes += readers
        written = readers[0].outputs[0]
    return nodes[0], nodes[1]


def _slot(match: AttentionMatch) -> tuple[ir.Value, ir.Value]:
    """The slot of the first new token, and the slots in use before it, both float32 [batch·N, 1, 1, 1]."""
    node = match.write_indices.producer()
    for op_type in ("Cast", "Reshape"):
        if node is None or node.op_type != op_type or node.inputs[0] is None:
            raise ir.passes.PreconditionError(
                f"{match.write_indices.name} is not a slot that is chosen by rank"
            )
        node = node.inputs[0].producer()
    if node is None or node.op_type != "Where" or node.inputs[1] is None:
        raise ir.passes.PreconditionError(f"{match.write_indices.name} is not a slot that is chosen by rank")
    return node.outputs[0], node.inputs[1]
