"""What a float16 graph computes in float32, by name, because float16 cannot hold it.

Knows the names that `kvexport.graph.writer` gives to the residual stream and the MLPs; weights stay as they are in the
data file, and a Cast that engines fold widens them. Must not know how large any number is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx_ir as ir

from kvexport.bundle.graph_io import attention_residual, residual_tap
from kvexport.graph.nodes import Nodes, dtype_of

_WIDE = "float32"


@dataclass(frozen=True)
class Float32Exceptions:
    """What is computed in float32.

    Attributes:
        stream: the residual stream, and with it the norms that read it.
        mlps: layers whose MLP is, from its first matrices to its last.
    """

    stream: bool = False
    mlps: frozenset[int] = frozenset()

    @property
    def names(self) -> list[str]:
        """For people: the stream, and nodes as the graph calls them."""
        return (["residual stream"] if self.stream else []) + [
            f"layers.{layer}.mlp" for layer in sorted(self.mlps)
        ]

    def covers(self, node: str) -> bool:
        """Whether the node of this name is concerned."""
        match = re.match(r"layers\.(\d+)\.(mlp\.)?", node)
        if match is None:
            return self.stream and node in ("logits.chosen", "final_norm")
        layer, in_mlp = int(match[1]), match[2] is not None
        if in_mlp:
            return layer in self.mlps
        norms = (f"layers.{layer}.attention_norm", f"layers.{layer}.mlp_norm")
        return self.stream and node in (attention_residual(layer), residual_tap(layer), *norms)


NO_EXCEPTIONS = Float32Exceptions()


class KeepFloat32(ir.passes.InPlacePass):
    """Pre-condition: what is kept is in the graph. Post-condition: each of its nodes gives float32, and what reads one
    without being kept reads it in the graph's dtype."""

    def __init__(self, exceptions: Float32Exceptions, dtype: str) -> None:
        self._exceptions, self._dtype = exceptions, dtype
        self._needed = {
            *(f"layers.{layer}.mlp.down" for layer in exceptions.mlps),
            *(["final_norm"] if exceptions.stream else []),
        }

    def requires(self, model: ir.Model) -> None:
        if missing := self._needed - {node.name for node in model.graph}:
            raise ir.passes.PreconditionError(f"the graph has no node {', '.join(sorted(missing))}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        wide_nodes = self._nodes(model)
        for node in wide_nodes:
            before = Nodes(model.graph, _WIDE, before=node)
            for index, value in enumerate(node.inputs):
                if value is not None and dtype_of(value) == self._dtype:
                    node.replace_input_with(index, before.cast(value, _WIDE, f"{node.name}.{index}.{_WIDE}"))
            node.outputs[0].dtype = ir.DataType.FLOAT
        for node in wide_nodes:
            (output,) = node.outputs
            readers = [(use.node, use.idx) for use in output.uses() if use.node not in wide_nodes]
            if readers:
                first = next(each for each in model.graph if any(each is reader for reader, _ in readers))
                narrow = Nodes(model.graph, self._dtype, before=first).cast(
                    output, self._dtype, f"{output.name}.{self._dtype}"
                )
                for reader, index in readers:
                    reader.replace_input_with(index, narrow)
        return ir.passes.PassResult(model, bool(wide_nodes))

    def ensures(self, model: ir.Model) -> None:
        for node in self._nodes(model):
            if dtype_of(node.outputs[0]) != _WIDE:
                raise ir.passes.PostconditionError(f"{node.name} gives {dtype_of(node.outputs[0])}")

    def _nodes(self, model: ir.Model) -> list[ir.Node]:
        return [
            node
            for node in model.graph
            if node.op_type != "Cast" and self._exceptions.covers(node.name or "")
        ]
