"""Compute parts of a float16 graph in float32: parts whose numbers float16 cannot represent.

The parts are named as `kvexport.graph.writer` names the residual stream and the MLPs. Weights stay float16 in
the data file; a Cast, which engines fold, widens them. Scales of integer weights are stored again in float32.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kvexport.bundle.graph_io import attention_residual, attention_tap, residual_tap
from kvexport.graph.nodes import Nodes, dtype_of

_FLOAT32 = "float32"
_OUTPUT_OPERATORS = ("RMSNormalization", "LayerNormalization", "Mul")  # of output norms, residual multipliers


@dataclass(frozen=True)
class Float32Exceptions:
    """Parts of a float16 graph that are computed in float32.

    Attributes:
        stream: the residual stream, the norms that read it, and the output norms whose results it adds.
        mlps: indices of the layers whose whole MLP is computed in float32.
    """

    stream: bool = False
    mlps: frozenset[int] = frozenset()

    @property
    def names(self) -> list[str]:
        """Names for messages and reports: the residual stream, and the MLPs by the names of their nodes."""
        return (["residual stream"] if self.stream else []) + [
            f"layers.{layer}.mlp" for layer in sorted(self.mlps)
        ]

    def covers(self, node: ir.Node) -> bool:
        """Whether a node is computed in float32."""
        name = str(node.name)
        match = re.match(r"layers\.(\d+)\.(mlp\.)?", name)
        if match is None:
            return self.stream and name in ("logits.chosen", "final_norm")
        layer, in_mlp = int(match[1]), match[2] is not None
        if in_mlp and layer in self.mlps:
            return True
        parts = ("attention_norm", "mlp_norm", "attention_residual_norm", "mlp_residual")
        stream = (
            attention_residual(layer),
            residual_tap(layer),
            *(f"layers.{layer}.{part}" for part in parts),
        )
        # What is added to the stream: an output norm with large weights makes large numbers of small ones.
        added = name.removesuffix(".unscaled") in (attention_tap(layer), f"layers.{layer}.mlp.down")
        return self.stream and (name in stream or (added and node.op_type in _OUTPUT_OPERATORS))


NO_EXCEPTIONS = Float32Exceptions()


class KeepFloat32(ir.passes.InPlacePass):
    """Compute the exceptions in float32; every other node reads their results in the graph's dtype.

    Pre-condition: the graph has the nodes of the exceptions. Post-condition: each of these nodes has a
    float32 output.
    """

    def __init__(self, exceptions: Float32Exceptions, dtype: str) -> None:
        self._exceptions, self._dtype = exceptions, dtype
        self._needed = {
            *(f"layers.{layer}.mlp.down" for layer in exceptions.mlps),
            *(["logits.chosen"] if exceptions.stream else []),
        }

    def requires(self, model: ir.Model) -> None:
        if missing := self._needed - {node.name for node in model.graph}:
            raise ir.passes.PreconditionError(f"the graph has no node {', '.join(sorted(missing))}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        wide_nodes = self._nodes(model)
        for node in wide_nodes:
            before = Nodes(model.graph, _FLOAT32, before=node)
            for index, value in enumerate(node.inputs):
                if value is not None and dtype_of(value) == self._dtype:
                    scales = value.const_value
                    if node.op_type == "DequantizeLinear" and scales is not None:  # engines need constants
                        wide = before.constant(f"{value.name}.{_FLOAT32}", scales.numpy().astype(np.float32))
                        node.replace_input_with(index, wide)
                        continue
                    node.replace_input_with(
                        index, before.cast(value, _FLOAT32, f"{node.name}.{index}.{_FLOAT32}")
                    )
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
            if dtype_of(node.outputs[0]) != _FLOAT32:
                raise ir.passes.PostconditionError(
                    f"{node.name} has an output of {dtype_of(node.outputs[0])}, not {_FLOAT32}"
                )

    def _nodes(self, model: ir.Model) -> list[ir.Node]:
        return [node for node in model.graph if node.op_type != "Cast" and self._exceptions.covers(node)]
