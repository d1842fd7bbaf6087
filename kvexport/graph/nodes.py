"""Build the nodes, weights and constants of one graph, each with an explicit name and shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from kvexport.bundle.formats import WeightFormat
from kvexport.bundle.graph_io import Shape, TensorSpec
from kvexport.errors import UsageError
from kvexport.graph.weights import NUMPY_DTYPES, WeightFile

if TYPE_CHECKING:
    from torch import Tensor

    from kvexport.model.decoder import WeightCodes

_IR_VERSION = 12  # the first version that has opset 24


def ir_dtype(dtype: str) -> ir.DataType:
    """The onnx-ir dtype of a numpy (or ml_dtypes) dtype name."""
    return ir.DataType.from_numpy(NUMPY_DTYPES.get(dtype) or np.dtype(dtype))


def sizes(value: ir.Value) -> Shape:
    """The shape of a value: numbers, and names of symbolic sizes."""
    assert value.shape is not None
    return tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)


def dtype_of(value: ir.Value) -> str:
    """The numpy (or ml_dtypes) name of a value's dtype."""
    assert value.dtype is not None
    return str(value.dtype.numpy().name)


class Nodes:
    """Add nodes to a graph, at its end or before the node `before`. A node is named as its first output."""

    def __init__(self, graph: ir.Graph, dtype: str, before: ir.Node | None = None) -> None:
        self.dtype = dtype
        self._graph, self._before = graph, before

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        name: str,
        shape: Shape | None = None,
        dtype: str | None = None,
        domain: str = "",
        **attributes: float | str | Sequence[int],
    ) -> ir.Value:
        """Add one node with one output.

        Args:
            name: name of the node and of its output.
            shape: shape of the output; None: the shape of the first input.
            dtype: data type of the output; None: the graph's dtype.
        """
        if shape is None:
            assert inputs[0] is not None
            shape = sizes(inputs[0])
        output = _value(name, dtype or self.dtype, shape)
        self._insert(ir.node(op_type, inputs, attributes, domain=domain, outputs=[output], name=name))
        return output

    def split(self, x: ir.Value, parts: Sequence[str], axis: int) -> list[ir.Value]:
        """Split x into equal parts along an axis; `parts` are the names of the outputs."""
        shape = list(sizes(x))
        length = shape[axis]
        assert isinstance(length, int)
        shape[axis] = length // len(parts)
        outputs = [_value(part, self.dtype, tuple(shape)) for part in parts]
        self._insert(ir.node("Split", [x], {"axis": axis}, outputs=outputs, name=parts[0]))
        return outputs

    def cast(self, x: ir.Value, dtype: str, name: str) -> ir.Value:
        """Cast x to another dtype."""
        return self.op("Cast", x, name=name, dtype=dtype, to=int(ir_dtype(dtype)))

    def constant(self, name: str, values: NDArray[Any]) -> ir.Value:
        """A small initializer, stored in the graph; an existing one of this name is returned unchanged."""
        constant = self._graph.initializers.get(name)
        if constant is not None:
            return constant
        return self._register(name, ir.Tensor(values, name=name), values.shape)

    def integer(self, value: int) -> ir.Value:
        """A constant int64 scalar, named by its value."""
        return self.constant(f"int64({value})", np.array(value, dtype=np.int64))

    def integers(self, *values: int) -> ir.Value:
        """A constant int64 vector (a shape, or axes), named by its values."""
        return self.constant(f"int64[{','.join(map(str, values))}]", np.array(values, dtype=np.int64))

    def number(self, name: str, value: float, dtype: str | None = None) -> ir.Value:
        """A constant scalar; `dtype` None: the graph's dtype."""
        return self.constant(name, np.array(value, dtype=NUMPY_DTYPES[dtype or self.dtype]))

    def _insert(self, node: ir.Node) -> None:
        if self._before is None:
            self._graph.append(node)
        else:
            self._graph.insert_before(self._before, node)

    def _register(self, name: str, tensor: ir.TensorProtocol, shape: tuple[int, ...]) -> ir.Value:
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(shape), const_value=tensor
        )
        self._graph.register_initializer(value)
        return value


class NodeBuilder(Nodes):
    """A new graph and the file of its weights.

    Attributes:
        matrices: format and number of weights of each matrix that was written, in order.
    """

    def __init__(self, name: str, opset: int, dtype: str, weights: WeightFile) -> None:
        super().__init__(ir.Graph((), (), nodes=(), name=name, opset_imports={"": opset}), dtype)
        self._weights = weights
        self.matrices: list[tuple[WeightFormat, int]] = []

    def input(self, spec: TensorSpec) -> ir.Value:
        """Add an input to the graph."""
        value = _value(spec.name, spec.dtype, spec.shape)
        self._graph.inputs.append(value)
        return value

    def output(self, value: ir.Value) -> None:
        """Make a value an output of the graph."""
        self._graph.outputs.append(value)

    def weight(self, name: str, values: NDArray[Any]) -> ir.Value:
        """An initializer in the graph's dtype, written to the data file immediately."""
        return self._register(name, self._weights.append(name, values), values.shape)

    def matrix(
        self, name: str, weight: Tensor, codes: WeightCodes | None, *, transposed: bool = False
    ) -> ir.Value:
        """A weight [out, in], written to the data file immediately.

        Codes are written as integers, and dequantised in the graph by DequantizeLinear, directly on the
        stored tensor: the one form that every engine keeps small.

        Args:
            name: name of the initializer; that of the scales and of the result begin with it.
            weight: [out, in].
            codes: the same as integers; None: it is stored in the graph's dtype.
            transposed: store and return [in, out].

        Raises:
            UsageError: a number does not fit the graph's dtype, or a scale is 0 in it.
        """
        stored_as = WeightFormat(self.dtype) if codes is None else format_of(codes)
        self.matrices.append((stored_as, weight.numel()))
        if codes is None:
            values = np.asarray(weight)
            return self.weight(name, values.T if transposed else values)
        integers, scales = np.asarray(codes.codes), np.asarray(codes.scales)
        axis, block = 1, stored_as.block
        if transposed:
            integers, scales, axis = integers.T, scales.T, 0
        if block is None:  # a scale for each row of [out, in]
            scales, axis = scales.reshape(-1), 1 - axis
        if not (scales.astype(NUMPY_DTYPES[self.dtype]) > 0).all():
            raise UsageError(
                f"the scales of tensor {name} must be greater than 0 in {self.dtype}",
                got=f"{float(scales.min()):g}",
                fix="use --dtype bfloat16 or --dtype float32",
            )
        tensor = self._weights.append_integers(name, integers, codes.bits)
        stored = self._register(name, tensor, integers.shape)
        scale = self.weight(f"{name}.scale", scales)
        result = f"{name}.dequantized"
        if block is None:
            return self.op("DequantizeLinear", stored, scale, name=result, axis=axis)
        return self.op("DequantizeLinear", stored, scale, name=result, axis=axis, block_size=block)

    def model(self, producer: str) -> ir.Model:
        """The model of the finished graph."""
        return ir.Model(self._graph, ir_version=_IR_VERSION, producer_name=producer)


def format_of(codes: WeightCodes) -> WeightFormat:
    """The format of a weight in codes."""
    columns, blocks = codes.codes.shape[1], codes.scales.shape[1]
    block = None if codes.bits == 8 and blocks == 1 else columns // blocks
    return WeightFormat(f"int{codes.bits}", block)


def _value(name: str, dtype: str, shape: Shape) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir_dtype(dtype)), shape=ir.Shape(shape))
