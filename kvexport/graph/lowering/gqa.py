"""Lower attention to ONNX Runtime's GroupQueryAttention, which writes the cache and skips unused capacity.

The limits of the operator were measured with ONNX Runtime 1.31.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from kvexport.bundle.graph_io import BATCH, SEQUENCE
from kvexport.graph.lowering.grouped import replace_attention
from kvexport.graph.lowering.matches import AttentionMatch, find_attention
from kvexport.graph.nodes import Nodes, dtype_of, sizes

DOMAIN = "com.microsoft"
_HEAD_DIM_MULTIPLE = 8
_ROTATED_MULTIPLE = 16  # of head widths that the operator rotates itself
_FLOAT32_BYTES = 4
_CACHED_BYTES = 1 << 20  # of a head's keys that a core's second-level cache holds


class GroupQueryAttention(ir.passes.InPlacePass):
    """Replace attention, cache writes and rotation by GroupQueryAttention where the operator supports it.

    Not supported, and unchanged: keys and values of unequal width, widths that are not a multiple of 8,
    biases (ALiBi), softcaps, windows, and layers with eviction. Rows of a batch that have several tokens
    and a past must be run one by one, because the operator does not take them together.

    Pre-condition: attention of the standard form. Post-condition: no GroupQueryAttention copies a cache: its
    caches are an input and an output of the graph.
    """

    def __init__(self, replaces: Callable[[AttentionMatch], bool] = lambda match: True) -> None:
        """`replaces`: whether an Attention that the operator supports is replaced; by default, every one."""
        self._replaces = replaces

    def requires(self, model: ir.Model) -> None:
        find_attention(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        chosen = [match for match in find_attention(model) if self._supports(match)]
        for match in chosen:
            _lower(model, match)
        if chosen:
            model.opset_imports[DOMAIN] = 1
        return ir.passes.PassResult(model, bool(chosen))

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            if node.op_type != "GroupQueryAttention":
                continue
            caches = zip(node.inputs[3:5], node.outputs[1:3], strict=True)
            if not all(
                past is not None and past.is_graph_input() and present.is_graph_output()
                for past, present in caches
            ):
                raise ir.passes.PostconditionError(
                    f"the caches of {node.name} are not inputs and outputs of the graph"
                )

    def _supports(self, match: AttentionMatch) -> bool:
        plain = (
            match.mask.name == "mask.causal"
            and match.softcap is None
            and match.key_dim == match.value_dim
            and match.key_dim % _HEAD_DIM_MULTIPLE == 0
        )
        return plain and self._replaces(match)


def is_fast_on_cpu(match: AttentionMatch) -> bool:
    """Whether the operator is faster on the CPU than grouped products.

    It reads the keys and values of a KV head again for each query head that shares it: from the processor's
    cache, if a head's keys at full capacity fit it. It skips unused slots, and rotates; grouped products do
    neither.
    """
    if match.heads == match.kv_heads:
        return True
    rotation = match.query.producer()
    if rotation is None or rotation.op_type != "RotaryEmbedding" or len(rotation.inputs) != 4:
        return False
    table = rotation.inputs[1]
    assert table is not None
    capacity = sizes(table)[0]
    assert isinstance(capacity, int)
    return capacity * match.key_dim * _FLOAT32_BYTES <= _CACHED_BYTES


def _lower(model: ir.Model, match: AttentionMatch) -> None:
    graph = model.graph
    dtype = dtype_of(match.query)
    name = str(match.node.outputs[0].name)
    nodes = Nodes(graph, dtype, before=match.node)
    new_key, new_value = match.key_write.inputs[1], match.value_write.inputs[1]
    past_key, past_value = match.key_write.inputs[0], match.value_write.inputs[0]
    assert new_key and new_value and past_key and past_value
    query, key, tables = match.query, new_key, []
    rotations = [value.producer() for value in (query, key)]
    rotated = all(  # by whole tables: GroupQueryAttention does not take rows selected from them
        node is not None and node.op_type == "RotaryEmbedding" and len(node.inputs) == 4 for node in rotations
    )
    if rotated and match.key_dim % _ROTATED_MULTIPLE == 0:
        (query, cos, sin, _), (key, *_) = (  # type: ignore[assignment]
            node.inputs for node in rotations if node is not None
        )
        tables = [cos, sin]
    inputs = [_flat(nodes, value) for value in (query, key, new_value)]
    lengths = _lengths(model, nodes, _first_slot(match))
    flat = ir.Shape((BATCH, SEQUENCE, match.heads * match.value_dim))
    mixed = ir.Value(name=f"{name}.flat", type=match.query.type, shape=flat)
    attributes = {
        "num_heads": match.heads,
        "kv_num_heads": match.kv_heads,
        "scale": match.scale,
        "do_rotary": int(bool(tables)),
    }
    node = ir.node(
        "GroupQueryAttention",
        [*inputs, past_key, past_value, *lengths, *tables],
        attributes,
        domain=DOMAIN,
        name=f"{name}.shared",
        outputs=[
            mixed,
            *(
                ir.Value(name=cache.name, type=cache.type, shape=cache.shape)
                for cache in (match.key, match.value)
            ),
        ],
    )
    graph.insert_before(match.node, node)
    writes = [match.key_write, match.value_write]
    by_token = nodes.integers(0, 0, match.heads, match.value_dim)
    batch, heads, sequence, width = sizes(match.node.outputs[0])
    heads_apart = nodes.op(
        "Reshape", mixed, by_token, name=f"{name}.by_token", shape=(batch, sequence, heads, width)
    )
    by_head = nodes.op(
        "Transpose",
        heads_apart,
        name=f"{name}.by_head",
        shape=(batch, heads, sequence, width),
        perm=[0, 2, 1, 3],
    )
    replace_attention(model, match, by_head)
    _join(nodes, by_head, mixed)
    for write, new in zip(writes, node.outputs[1:], strict=True):
        graph.outputs[graph.outputs.index(write.outputs[0])] = new
        graph.remove(write, safe=True)


def _flat(nodes: Nodes, value: ir.Value) -> ir.Value:
    """[batch, heads, sequence, width] as [batch, sequence, heads·width]; an existing value if possible."""
    batch, heads, sequence, width = sizes(value)
    assert isinstance(heads, int) and isinstance(width, int)
    transpose = value.producer()
    if transpose is not None and transpose.op_type == "Transpose" and transpose.inputs[0] is not None:
        by_token = transpose.inputs[0]
    else:
        by_token = nodes.op(
            "Transpose",
            value,
            name=f"{value.name}.by_token",
            shape=(batch, sequence, heads, width),
            perm=[0, 2, 1, 3],
        )
    reshape = by_token.producer()
    if (
        reshape is not None
        and reshape.op_type == "Reshape"
        and reshape.inputs[0] is not None
        and len(sizes(reshape.inputs[0])) == 3
    ):
        return reshape.inputs[0]
    shape = (batch, sequence, heads * width)
    return nodes.op(
        "Reshape", by_token, nodes.integers(0, 0, heads * width), name=f"{value.name}.flat", shape=shape
    )


def _join(nodes: Nodes, by_head: ir.Value, flat: ir.Value) -> None:
    """Where a Transpose and a Reshape only join the heads again, read `flat` instead."""
    for use in list(by_head.uses()):
        if use.node.op_type != "Transpose":
            continue
        for inner in list(use.node.outputs[0].uses()):
            if inner.node.op_type == "Reshape":
                ir.convenience.replace_all_uses_with(inner.node.outputs[0], flat)


def _first_slot(match: AttentionMatch) -> ir.Value:
    """The slot of the first new token; a position modulo the capacity is the position."""
    index = match.write_indices.producer()
    if index is None or index.op_type != "Mod" or index.inputs[0] is None:
        return match.write_indices
    return index.inputs[0]


def _lengths(model: ir.Model, nodes: Nodes, write_indices: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The slot of each row's last token, int32 [batch], and the length of the longest row, int32 []."""
    values = {output.name: output for node in model.graph for output in node.outputs}
    if "gqa.last" in values:
        return values["gqa.last"], values["gqa.total"]
    inputs = {value.name: value for value in model.graph.inputs}
    one = nodes.integer(1)
    shape = nodes.op("Shape", inputs["input_ids"], name="gqa.shape", shape=(2,), dtype="int64")
    length = nodes.op("Gather", shape, one, name="gqa.sequence", shape=(), dtype="int64", axis=0)
    stop = nodes.op("Add", write_indices, length, name="gqa.stop", dtype="int64")
    last = nodes.op("Sub", stop, one, name="gqa.last_slot", dtype="int64")
    longest = nodes.op("ReduceMax", stop, name="gqa.longest", shape=(), dtype="int64", keepdims=0)
    return nodes.cast(last, "int32", "gqa.last"), nodes.cast(longest, "int32", "gqa.total")
