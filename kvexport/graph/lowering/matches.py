"""Find the attention of each layer in a graph of the standard form: Attention, its inputs, its cache writes.

The standard form is the one that `kvexport.graph.writer` writes.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from kvexport.bundle.graph_io import BUDGET, STATE, present, window_of
from kvexport.graph.nodes import sizes


@dataclass(frozen=True)
class AttentionMatch:
    """The attention of one layer, with H query heads, N KV heads and G = H / N.

    In layers with eviction and shared KV heads (G > 1), heads lie along the batch axis: `batch` is batch·N, H
    is G, and N is 1.

    Attributes:
        node: the Attention node; its output is [batch, H, sequence, value_dim].
        query: [batch, H, sequence, key_dim], not scaled.
        key: the written cache [batch, N, slots, key_dim], or a Reshape of it.
        value: the written cache [batch, N, slots, value_dim], or a Reshape of it.
        mask: bool [batch, 1 or H, sequence, slots], or a bias [batch, H, sequence, slots].
        scale: factor of the products of queries and keys.
        softcap: scaled products x become softcap · tanh(x / softcap); None: they stay.
    """

    node: ir.Node
    query: ir.Value
    key: ir.Value
    value: ir.Value
    mask: ir.Value
    scale: float
    softcap: float | None

    @property
    def heads(self) -> int:
        return _size(self.query, 1)

    @property
    def kv_heads(self) -> int:
        return _size(self.key, 1)

    @property
    def key_dim(self) -> int:
        return _size(self.key, 3)

    @property
    def value_dim(self) -> int:
        return _size(self.value, 3)

    @property
    def key_write(self) -> ir.Node:
        """The TensorScatter that writes `key`; its inputs are the cache, the new keys, and the slots."""
        return _writer(self.key)

    @property
    def value_write(self) -> ir.Node:
        """The TensorScatter that writes `value`."""
        return _writer(self.value)

    @property
    def layer(self) -> int:
        """Index of the layer, from the name of its cache."""
        return int(str(_input(self.key_write, 0).name).split(".")[1])

    @property
    def write_indices(self) -> ir.Value:
        """The slot of the first new token of each row of the cache, int64 [batch]."""
        return _input(self.key_write, 2)

    @property
    def ring(self) -> int | None:
        """The window of a layer whose cache is a ring; None for other layers."""
        return window_of(sizes(self.key_write.outputs[0])[2])

    @property
    def state_write(self) -> ir.Node | None:
        """The TensorScatter that writes the state of the slots; None in layers without eviction.

        Raises:
            PreconditionError: the layer has a budget of slots, but no state.
        """
        if BUDGET not in sizes(self.key_write.outputs[0]):
            return None
        writers = [
            use.node
            for use in self.write_indices.uses()
            if use.node.outputs[0].name == present(self.layer, STATE)
        ]
        if len(writers) != 1 or writers[0].op_type != "TensorScatter":
            raise ir.passes.PreconditionError(
                f"{self.node.name} attends to a budget of slots without a state"
            )
        return writers[0]

    @property
    def biased(self) -> bool:
        """Whether the mask is a bias to add to the scores, and not bool."""
        return self.mask.dtype != ir.DataType.BOOL


def find_attention(model: ir.Model) -> list[AttentionMatch]:
    """Match every Attention of the graph, in order.

    Raises:
        PreconditionError: an Attention does not have the standard form.
    """
    return [_match(node) for node in model.graph if node.op_type == "Attention" and node.domain == ""]


def require_attention(model: ir.Model) -> None:
    """Pre-condition of passes that replace attention.

    Raises:
        PreconditionError: the graph has no Attention, or one that does not have the standard form.
    """
    if not find_attention(model):
        raise ir.passes.PreconditionError("the graph has no Attention")


def require_removed(model: ir.Model, *op_types: str) -> None:
    """Post-condition: the graph has no nodes of these types of the default domain.

    Raises:
        PostconditionError: it has one.
    """
    for node in model.graph:
        if node.domain == "" and node.op_type in op_types:
            raise ir.passes.PostconditionError(f"{node.op_type} {node.name} is still in the graph")


def _match(node: ir.Node) -> AttentionMatch:
    inputs = [value for value in node.inputs if value is not None]
    if (
        len(inputs) != 4
        or len(node.outputs) != 1
        or "scale" not in node.attributes
        or node.attributes.keys() - {"scale", "softcap"}
    ):
        raise ir.passes.PreconditionError(f"Attention {node.name} does not have the standard form")
    query, key, value, mask = inputs
    for cache in (key, value):
        _writer(cache)
    softcap = node.attributes.get("softcap")
    return AttentionMatch(
        node,
        query,
        key,
        value,
        mask,
        node.attributes["scale"].as_float(),
        None if softcap is None else softcap.as_float(),
    )


def _writer(cache: ir.Value) -> ir.Node:
    node = cache.producer()
    if node is not None and node.op_type == "Reshape":
        node = _input(node, 0).producer()
    if (
        node is None
        or node.op_type != "TensorScatter"
        or node.inputs[0] is None
        or not node.inputs[0].is_graph_input()
    ):
        raise ir.passes.PreconditionError(f"{cache.name} is not a cache written by a TensorScatter")
    return node


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _size(value: ir.Value, axis: int) -> int:
    size = sizes(value)[axis]
    assert isinstance(size, int), f"{value.name} has no fixed size along axis {axis}"
    return size
