"""A cache that the graph only reads, for engines that cannot write one in place.

Attention over what the cache holds and over the new tokens is computed apart and joined in one softmax; the graph gives
the new keys and values alone, and whoever runs it writes them into the buffer. Nothing of the cache's size is copied.
Knows that slot n holds position n; must not know how attention is spelled.
"""

from __future__ import annotations

import onnx_ir as ir

from kvexport.graph.contract import BATCH, CAPACITY, SEQUENCE, update
from kvexport.graph.lowering.grouped import Memory, bias_of, grouped_attention, replace
from kvexport.graph.lowering.sites import attention_sites, require_gone, require_sites
from kvexport.graph.nodes import Nodes, dtype_of, sizes

ALL = f"{CAPACITY}+{SEQUENCE}"
_NEVER = 2**30  # a position that no token has: nothing sees a slot of it


class SplitCache(ir.passes.InPlacePass):
    """present.* (the written caches) become update.* (the new tokens' keys and values [batch, N, sequence, width]).

    Pre-condition: attention of the standard form, masks made of `mask.slots`. Post-condition: neither Attention nor
    TensorScatter is left, and no output has the cache's size.
    """

    def requires(self, model: ir.Model) -> None:
        require_sites(model)
        _slots(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        _see_new_tokens(model)
        for index, site in enumerate(attention_sites(model)):
            nodes = Nodes(graph, dtype_of(site.query), before=site.node)
            (old_key, new_key, _), (old_value, new_value, _) = site.key_write.inputs, site.value_write.inputs
            assert old_key and new_key and old_value and new_value
            memories = [Memory(old_key, old_value), Memory(new_key, new_value)]
            writes = [site.key_write, site.value_write]
            replace(model, site, grouped_attention(nodes, site, memories, bias_of(nodes, site)))
            for which, write, new in zip(("key", "value"), writes, (new_key, new_value), strict=True):
                graph.outputs[graph.outputs.index(write.outputs[0])] = new
                new.name = update(index, which)
                graph.remove(write, safe=True)
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        require_gone(model, "Attention", "TensorScatter")
        for output in model.graph.outputs:
            if CAPACITY in sizes(output):
                raise ir.passes.PostconditionError(f"output {output.name} still has the cache's size")


def _slots(model: ir.Model) -> ir.Value:
    """The position that each slot of the cache holds, int64 [capacity].

    Raises:
        PreconditionError: the graph does not make its masks of it.
    """
    for node in model.graph:
        if node.name == "mask.slots" and node.op_type == "Range":
            return node.outputs[0]
    raise ir.passes.PreconditionError("the graph makes no mask of mask.slots")


def _see_new_tokens(model: ir.Model) -> None:
    """Masks over the cache's slots become masks over those and the new tokens, [batch, ..., capacity + sequence].

    A slot that is not yet written counts as a position that nothing sees.
    """
    slots = _slots(model)
    users = [use.node for use in slots.uses()]
    inputs = {value.name: value for value in model.graph.inputs}
    range_node = slots.producer()
    assert range_node is not None
    after = next(node for node in model.graph if node in users)
    nodes = Nodes(model.graph, "int64", before=after)
    axes, column, row = nodes.integers(1, 2, 3), (BATCH, 1, 1, 1), (BATCH, 1, 1, CAPACITY)
    start = nodes.op("Unsqueeze", inputs["write_indices"], axes, name="mask.written", shape=column)
    written = nodes.op("Less", slots, start, name="mask.is_written", shape=row, dtype="bool")
    cached = nodes.op("Where", written, slots, nodes.integer(_NEVER), name="mask.cached", shape=row)
    shape = (BATCH, 1, 1, SEQUENCE)
    new = nodes.op("Unsqueeze", inputs["position_ids"], nodes.integers(1, 2), name="mask.new", shape=shape)
    joined = nodes.op("Concat", cached, new, name="mask.all", shape=(BATCH, 1, 1, ALL), axis=-1)
    for node in users:
        for index, value in enumerate(node.inputs):
            if value is slots and node is not written.producer():
                node.replace_input_with(index, joined)
    _widen(joined)


def _widen(value: ir.Value) -> None:
    """Whatever a mask is made of has its new shape, as far as the Attention that reads it."""
    for use in value.uses():
        if use.node.op_type == "Attention":
            continue
        for output in use.node.outputs:
            shape = sizes(output)
            if shape[-1] == CAPACITY:
                output.shape = ir.Shape((*shape[:-1], ALL))
                _widen(output)
