"""Lower operators of opset 18 and later to operators of opset 17, which TensorRT 10.3 and 10.13 import.

A graph with integer weights is of opset 21, the first with INT4 and with blocks in DequantizeLinear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import onnx_ir as ir

from kvexport.bundle.graph_io import BATCH, SEQUENCE
from kvexport.graph.lowering.matches import require_removed
from kvexport.graph.nodes import Nodes, dtype_of, sizes

_OPSET, _QUANTIZED_OPSET = 17, 21
_IR_VERSIONS = {_OPSET: 8, _QUANTIZED_OPSET: 10}  # released with these opsets
# Operators of a lowered graph. None of them changed its meaning between opset 17 and 24; ReduceMean and Split
# changed how they are written.
OPERATORS = frozenset(
    {
        "Add",
        "And",
        "ArgMax",
        "Cast",
        "Clip",
        "Concat",
        "DequantizeLinear",
        "Div",
        "Equal",
        "Erf",
        "Gather",
        "GatherND",
        "Gemm",
        "Greater",
        "GreaterOrEqual",
        "LayerNormalization",
        "Less",
        "LessOrEqual",
        "MatMul",
        "Mod",
        "Mul",
        "Neg",
        "Not",
        "Range",
        "ReduceMean",
        "ReduceSum",
        "Relu",
        "Reshape",
        "Shape",
        "Sigmoid",
        "Slice",
        "Softmax",
        "Split",
        "Sqrt",
        "Sub",
        "Tanh",
        "Transpose",
        "Unsqueeze",
        "Where",
    }
)


class Primitives(ir.passes.InPlacePass):
    """Replace RMSNormalization, RotaryEmbedding and Gelu by operators of opset 17.

    Pre-condition: rotations are half-split and over the whole head. Post-condition: every operator is one of
    OPERATORS.
    """

    def requires(self, model: ir.Model) -> None:
        for node in model.graph:
            if node.op_type == "RotaryEmbedding" and node.attributes:
                raise ir.passes.PreconditionError(f"{node.name} is not a half-split rotation of whole heads")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        rotary = _Rotary()
        replacements: dict[str, Callable[[Nodes, ir.Node], ir.Value]] = {
            "RMSNormalization": _rms_norm,
            "RotaryEmbedding": rotary.replace,
            "Gelu": _gelu,
        }
        for node in [node for node in model.graph if node.op_type in replacements]:
            (old,) = node.outputs
            new = replacements[node.op_type](Nodes(model.graph, dtype_of(old), before=node), node)
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            name = old.name
            model.graph.remove(node, safe=True)
            new.name = name
        quantized = any(node.op_type == "DequantizeLinear" for node in model.graph)
        if quantized:
            _write_as_opset_18(model.graph)
        model.opset_imports[""] = opset_of(quantized)
        model.ir_version = _IR_VERSIONS[opset_of(quantized)]
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        require_removed(model, *sorted({node.op_type for node in model.graph} - OPERATORS))
        for node in model.graph:
            if node.domain:
                raise ir.passes.PostconditionError(f"{node.name} is an operator of the domain {node.domain}")


def opset_of(quantized: bool) -> int:
    """The opset of a lowered graph, which may have integer weights."""
    return _QUANTIZED_OPSET if quantized else _OPSET


def _write_as_opset_18(graph: ir.Graph) -> None:
    """Write ReduceMean and Split as they are written from opset 18 on."""
    nodes = Nodes(graph, "float32")
    for node in graph:
        if node.op_type == "ReduceMean" and "axes" in node.attributes:
            axes = node.attributes.pop("axes").as_ints()
            node.resize_inputs(2)
            node.replace_input_with(1, nodes.integers(*axes))
        elif node.op_type == "Split" and len(node.inputs) == 1:
            node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _inputs(node: ir.Node) -> Iterator[ir.Value]:
    for value in node.inputs:
        assert value is not None
        yield value


def _rms_norm(nodes: Nodes, node: ir.Node) -> ir.Value:
    """x / √(mean x² + ε) in float32, times the weight in the graph's dtype."""
    (x, weight), name = _inputs(node), node.outputs[0].name
    wide = x if nodes.dtype == "float32" else nodes.cast(x, "float32", f"{name}.float32")
    mean = (*sizes(x)[:-1], 1)
    square = nodes.op("Mul", wide, wide, name=f"{name}.square", dtype="float32")
    mean_square = nodes.op(
        "ReduceMean", square, name=f"{name}.mean_square", shape=mean, dtype="float32", axes=[-1], keepdims=1
    )
    epsilon = node.attributes["epsilon"].as_float()
    epsilon_value = nodes.number(f"epsilon({epsilon:.9g})", epsilon, "float32")
    variance = nodes.op("Add", mean_square, epsilon_value, name=f"{name}.variance", dtype="float32")
    root = nodes.op("Sqrt", variance, name=f"{name}.root", dtype="float32")
    normed = nodes.op("Div", wide, root, name=f"{name}.normed", dtype="float32")
    if nodes.dtype != "float32":
        normed = nodes.cast(normed, nodes.dtype, f"{name}.{nodes.dtype}")
    return nodes.op("Mul", normed, weight, name=f"{name}.weighted")


class _Rotary:
    """Rotation by Gather, Split, Mul and Concat; rows of the tables are gathered once for all layers."""

    def __init__(self) -> None:
        self._rows: dict[str, ir.Value] = {}

    def replace(self, nodes: Nodes, node: ir.Node) -> ir.Value:
        (x, cos, sin, *positions), name = _inputs(node), node.outputs[0].name
        c, s = (self._gathered(nodes, table, positions) for table in (cos, sin))
        a, b = nodes.split(x, (f"{name}.a", f"{name}.b"), axis=3)
        products = [
            nodes.op("Mul", left, right, name=f"{name}.{label}")
            for label, left, right in (("a_cos", a, c), ("b_sin", b, s), ("b_cos", b, c), ("a_sin", a, s))
        ]
        real = nodes.op("Sub", products[0], products[1], name=f"{name}.real")
        imaginary = nodes.op("Add", products[2], products[3], name=f"{name}.imaginary")
        return nodes.op("Concat", real, imaginary, name=f"{name}.joined", shape=sizes(x), axis=-1)

    def _gathered(self, nodes: Nodes, table: ir.Value, positions: list[ir.Value]) -> ir.Value:
        """Rows [batch, 1, sequence, width/2] of a table [capacity, width/2] at positions.

        Without positions, the table already consists of the rows [batch, sequence, width/2].
        """
        assert table.name is not None
        if table.name not in self._rows:
            rows, width = table, sizes(table)[-1]
            if positions:
                shape: tuple[int | str, ...] = (BATCH, SEQUENCE, width)
                rows = nodes.op("Gather", table, *positions, name=f"{table.name}.taken", shape=shape, axis=0)
            shape = (BATCH, 1, SEQUENCE, width)
            self._rows[table.name] = nodes.op(
                "Unsqueeze", rows, nodes.integers(1), name=f"{table.name}.by_head", shape=shape
            )
        return self._rows[table.name]


def _gelu(nodes: Nodes, node: ir.Node) -> ir.Value:
    """x/2 · (1 + erf(x/√2)), or its tanh approximation."""
    (x,), name = _inputs(node), node.outputs[0].name
    one, half = nodes.number("gelu.one", 1.0), nodes.number("gelu.half", 0.5)
    if node.attributes["approximate"].as_string() == "tanh":
        square = nodes.op("Mul", x, x, name=f"{name}.square")
        bent = nodes.op("Mul", square, nodes.number("gelu.cubic", 0.044715), name=f"{name}.cubic")
        factor = nodes.op("Add", bent, one, name=f"{name}.factor")
        inner = nodes.op("Mul", x, factor, name=f"{name}.bent")
        inner = nodes.op(
            "Mul", inner, nodes.number("gelu.tanh_scale", math.sqrt(2 / math.pi)), name=f"{name}.inner"
        )
        step = nodes.op("Tanh", inner, name=f"{name}.tanh")
    else:
        inner = nodes.op("Mul", x, nodes.number("gelu.erf_scale", math.sqrt(0.5)), name=f"{name}.inner")
        step = nodes.op("Erf", inner, name=f"{name}.erf")
    raised = nodes.op("Add", step, one, name=f"{name}.raised")
    halved = nodes.op("Mul", x, half, name=f"{name}.halved")
    return nodes.op("Mul", halved, raised, name=f"{name}.product")
