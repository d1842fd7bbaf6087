"""Lower to a cache that the graph only reads, for engines that cannot write a cache in place.

Attention to the cached tokens and to the new tokens is computed separately and joined in one softmax. The
graph outputs only the new keys and values, and the caller writes them into the buffer: nothing of the cache's
size is copied. Slot n holds position n, or, in a ring, the last one that is n modulo its slots, or, in layers
with eviction, the position that its state gives.
"""

from __future__ import annotations

from collections.abc import Container

import onnx_ir as ir

from kvexport.bundle.graph_io import (
    BATCH,
    BUDGET,
    CAPACITY,
    KEY,
    SEQUENCE,
    STATE,
    VALUE,
    ring_axis,
    slots_output,
    update,
    window_of,
)
from kvexport.graph.lowering.grouped import KeyValues, attention_bias, grouped_attention, replace_attention
from kvexport.graph.lowering.matches import AttentionMatch, find_attention, require_attention, require_removed
from kvexport.graph.lowering.split_evicting import SlotMasks
from kvexport.graph.nodes import Nodes, dtype_of, sizes
from kvexport.graph.slots import NEVER, ring_name


class SplitCache(ir.passes.InPlacePass):
    """Replace the outputs present.* (written caches) by update.*, the new tokens [batch, N, sequence, width].

    Layers with eviction get another output, slots.*: the slot of each head's first new token; the others
    follow it.

    Pre-condition: attention of the standard form, with masks made as in `kvexport.graph.slots` or, in layers
    with eviction, of the state. Post-condition: the graph has no Attention and no TensorScatter, and no
    output has the size of the cache.
    """

    def requires(self, model: ir.Model) -> None:
        require_attention(model)
        for ring, match in _rings(find_attention(model)).items():
            if _is_linear(ring, match):
                _value(model, "mask.slots", "Range")
            else:
                _value(model, f"{ring_name(ring)}.held", "Where")
                _value(model, "last_position", "Gather")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        matches = find_attention(model)
        for ring, match in _rings(matches).items():
            if _is_linear(ring, match):
                _add_new_tokens_to_masks(model, match.write_indices)
            else:
                _add_new_tokens_to_ring(model, ring, match.write_indices)
        masks = SlotMasks(model)
        for match in matches:
            state_write = match.state_write
            if state_write is not None:
                extend_shapes(masks.add_new_tokens(match, state_write), BUDGET)
            _split(model, match, state_write)
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        require_removed(model, "Attention", "TensorScatter")
        for output in model.graph.outputs:
            if any(size in (CAPACITY, BUDGET) or window_of(size) is not None for size in sizes(output)):
                raise ir.passes.PostconditionError(f"output {output.name} still has the size of the cache")


def _split(model: ir.Model, match: AttentionMatch, state_write: ir.Node | None) -> None:
    """Attend to the cached and to the new tokens, and output what the writes would have written."""
    graph, nodes = model.graph, Nodes(model.graph, dtype_of(match.query), before=match.node)
    writes = {KEY: match.key_write, VALUE: match.value_write} | (
        {} if state_write is None else {STATE: state_write}
    )
    layer, slot = match.layer, match.write_indices
    parts = [
        [
            _as_read(nodes, read, write, part)
            for read, write in ((match.key, writes[KEY]), (match.value, writes[VALUE]))
        ]
        for part in (0, 1)
    ]
    reshapes = [value.producer() for value in (match.key, match.value)]
    replace_attention(
        model,
        match,
        grouped_attention(nodes, match, [KeyValues(*part) for part in parts], attention_bias(nodes, match)),
    )
    for node in reshapes:
        if node is not None and node.op_type == "Reshape":
            graph.remove(node, safe=True)
    for which, write in writes.items():
        _, new, _ = write.inputs
        assert new is not None
        at = graph.outputs.index(write.outputs[0])
        graph.outputs[at] = new
        new.name = update(layer, which)
        graph.remove(write, safe=True)
        if which == STATE:
            graph.outputs.insert(at + 1, slot)
            slot.name = slots_output(layer)


def _as_read(nodes: Nodes, read: ir.Value, write: ir.Node, part: int) -> ir.Value:
    """The cached tokens (part 0) or the new ones (part 1), in the layout that attention reads."""
    value, reshape = write.inputs[part], read.producer()
    assert value is not None
    if reshape is None or reshape.op_type != "Reshape":
        return value
    batch, heads, _, width = sizes(read)
    shape = (batch, heads, sizes(value)[2], width)
    return nodes.op("Reshape", value, reshape.inputs[1], name=f"{read.name}.{part}", shape=shape)


def _rings(matches: list[AttentionMatch]) -> dict[int | None, AttentionMatch]:
    """One layer without eviction for each window of a ring, and one whose cache is no ring as None."""
    return {match.ring: match for match in matches if match.state_write is None}


def _is_linear(ring: int | None, match: AttentionMatch) -> bool:
    """Whether slot n holds position n; else the masks are those of `kvexport.graph.slots.SlotsBuilder`."""
    index = match.write_indices.producer()
    return ring is None and (index is None or index.op_type != "Mod")


def _value(model: ir.Model, name: str, op_type: str) -> ir.Value:
    """The output of a node.

    Raises:
        PreconditionError: the graph does not have the node.
    """
    for node in model.graph:
        if node.name == name and node.op_type == op_type:
            return node.outputs[0]
    raise ir.passes.PreconditionError(f"the graph has no {op_type} {name}")


def _add_new_tokens_to_ring(model: ir.Model, window: int | None, index: ir.Value) -> None:
    """Extend the masks of a ring by the new tokens, [batch, ..., slots + sequence].

    Its slots hold what they held before the call, whose last position is the one before the first new token.
    """
    name, axis = ring_name(window), CAPACITY if window is None else ring_axis(window)
    last, held = _value(model, "last_position", "Gather"), _value(model, f"{name}.held", "Where")
    producer, modulo = last.producer(), index.producer()
    if producer is None or modulo is None or modulo.op_type != "Mod" or modulo.inputs[0] is None:
        raise ir.passes.PreconditionError(f"{index.name} is not the first position modulo the slots")
    if last.uses():  # of the first ring; the others share it
        nodes = Nodes(model.graph, "int64", before=producer)
        before = nodes.op("Sub", modulo.inputs[0], nodes.integer(1), name="position_before", shape=(BATCH,))
        ir.convenience.replace_all_uses_with(last, before)
    readers = [(use.node, use.idx) for use in held.uses()]
    nodes = Nodes(model.graph, "int64", before=_first_of(model, {node for node, _ in readers}))
    joined = _with_new_tokens(model, nodes, held, (BATCH, 1, 1, axis), name)
    for node, position in readers:
        node.replace_input_with(position, joined)
    extend_shapes(joined, axis)


def _first_of(model: ir.Model, readers: Container[ir.Node]) -> ir.Node:
    """The first of some nodes in the graph's order."""
    return next(node for node in model.graph if node in readers)


def _with_new_tokens(
    model: ir.Model, nodes: Nodes, cached: ir.Value, shape: tuple[int | str, ...], name: str
) -> ir.Value:
    """Positions of the cached tokens, of this shape, and behind them those of the new tokens."""
    inputs = {value.name: value for value in model.graph.inputs}
    new = nodes.op(
        "Unsqueeze",
        inputs["position_ids"],
        nodes.integers(1, 2),
        name=f"{name}.new",
        shape=(BATCH, 1, 1, SEQUENCE),
    )
    joined = (*shape[:3], f"{shape[3]}+{SEQUENCE}")
    return nodes.op("Concat", cached, new, name=f"{name}.all", shape=joined, axis=-1)


def _add_new_tokens_to_masks(model: ir.Model, write_indices: ir.Value) -> None:
    """Extend masks over the slots of the cache by the new tokens, [batch, ..., capacity + sequence].

    A slot that is not yet written gets a position that every mask hides.
    """
    slots = _value(model, "mask.slots", "Range")
    readers = [use.node for use in slots.uses()]
    nodes = Nodes(model.graph, "int64", before=_first_of(model, readers))
    axes, column, row = nodes.integers(1, 2, 3), (BATCH, 1, 1, 1), (BATCH, 1, 1, CAPACITY)
    start = nodes.op("Unsqueeze", write_indices, axes, name="mask.written", shape=column)
    written = nodes.op("Less", slots, start, name="mask.is_written", shape=row, dtype="bool")
    cached = nodes.op("Where", written, slots, nodes.integer(NEVER), name="mask.cached", shape=row)
    joined = _with_new_tokens(model, nodes, cached, row, "mask")
    for node in readers:
        for index, value in enumerate(node.inputs):
            if value is slots and node is not written.producer():
                node.replace_input_with(index, joined)
    extend_shapes(joined, CAPACITY)


def extend_shapes(value: ir.Value, slots: str) -> None:
    """Extend the shapes of all values computed from `value` by the new tokens, up to the Attention."""
    for use in value.uses():
        if use.node.op_type == "Attention":
            continue
        for output in use.node.outputs:
            shape = sizes(output)
            if slots in shape:
                output.shape = ir.Shape([f"{slots}+{SEQUENCE}" if size == slots else size for size in shape])
                extend_shapes(output, slots)
