"""Lower to a cache that the graph only reads, for engines that cannot write a cache in place.

Attention to the cached tokens and to the new tokens is computed separately and joined in one softmax. The
graph outputs only the new keys and values, and the caller writes them into the buffer: nothing of the cache's
size is copied. Slot n holds position n, or, in layers with eviction, the position that its state gives.
"""

from __future__ import annotations

import onnx_ir as ir

from kvexport.bundle.graph_io import (
    BATCH,
    BUDGET,
    CAPACITY,
    KEY,
    SEQUENCE,
    STATE,
    VALUE,
    slots_output,
    update,
)
from kvexport.graph.lowering.grouped import KeyValues, attention_bias, grouped_attention, replace_attention
from kvexport.graph.lowering.matches import AttentionMatch, find_attention, require_attention, require_removed
from kvexport.graph.lowering.split_evicting import SlotMasks
from kvexport.graph.nodes import Nodes, dtype_of, sizes

_NEVER = 2**30  # a position after all others, so that every mask hides the slot


class SplitCache(ir.passes.InPlacePass):
    """Replace the outputs present.* (written caches) by update.*, the new tokens [batch, N, sequence, width].

    Layers with eviction get another output, slots.*: the slot of each head's first new token; the others
    follow it.

    Pre-condition: attention of the standard form, with masks made of `mask.slots` or, in layers with
    eviction, of the state. Post-condition: the graph has no Attention and no TensorScatter, and no output has
    the size of the cache.
    """

    def requires(self, model: ir.Model) -> None:
        require_attention(model)
        if any(match.state_write is None for match in find_attention(model)):
            _slot_positions(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        matches = find_attention(model)
        without_eviction = [match for match in matches if match.state_write is None]
        if without_eviction:
            _add_new_tokens_to_masks(model, without_eviction[0].write_indices)
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
            if {CAPACITY, BUDGET} & set(sizes(output)):
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


def _slot_positions(model: ir.Model) -> ir.Value:
    """The position that each slot of the cache holds, int64 [capacity].

    Raises:
        PreconditionError: the graph does not have this value.
    """
    for node in model.graph:
        if node.name == "mask.slots" and node.op_type == "Range":
            return node.outputs[0]
    raise ir.passes.PreconditionError("the graph has no Range mask.slots")


def _add_new_tokens_to_masks(model: ir.Model, write_indices: ir.Value) -> None:
    """Extend masks over the slots of the cache by the new tokens, [batch, ..., capacity + sequence].

    A slot that is not yet written gets a position that every mask hides.
    """
    slots = _slot_positions(model)
    readers = [use.node for use in slots.uses()]
    inputs = {value.name: value for value in model.graph.inputs}
    range_node = slots.producer()
    assert range_node is not None
    after = next(node for node in model.graph if node in readers)
    nodes = Nodes(model.graph, "int64", before=after)
    axes, column, row = nodes.integers(1, 2, 3), (BATCH, 1, 1, 1), (BATCH, 1, 1, CAPACITY)
    start = nodes.op("Unsqueeze", write_indices, axes, name="mask.written", shape=column)
    written = nodes.op("Less", slots, start, name="mask.is_written", shape=row, dtype="bool")
    cached = nodes.op("Where", written, slots, nodes.integer(_NEVER), name="mask.cached", shape=row)
    shape = (BATCH, 1, 1, SEQUENCE)
    new = nodes.op("Unsqueeze", inputs["position_ids"], nodes.integers(1, 2), name="mask.new", shape=shape)
    joined = nodes.op(
        "Concat", cached, new, name="mask.all", shape=(BATCH, 1, 1, f"{CAPACITY}+{SEQUENCE}"), axis=-1
    )
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
