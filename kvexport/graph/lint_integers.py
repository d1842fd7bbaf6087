"""Rules of lint for integer weights: DequantizeLinear, zero points, and what may read the integers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kvexport.graph.lint_nodes import (
    Parser,
    Problems,
    constant,
    dtype_name,
    fixed_shape,
    is_constant,
    number,
)

_QUANTIZED_DTYPES = (ir.DataType.INT8, ir.DataType.INT4)


def check_integer_constant(node: ir.Node, parser: Parser) -> Problems:
    """Only DequantizeLinear may read a constant of integers in 8 or 4 bits."""
    if node.op_type in ("DequantizeLinear", "QuantizeLinear"):  # zero points have rules of their own
        return
    for value in node.inputs:
        if value is not None and value.dtype in _QUANTIZED_DTYPES and is_constant(value):
            yield (
                f"the constant {value.name} is {dtype_name(value)}, which only DequantizeLinear may read",
                "dequantise the stored tensor directly, and transpose, reshape or gather the result",
            )


def check_dequantize(node: ir.Node, parser: Parser) -> Problems:
    """Weights must be symmetric, in a form of scales that TensorRT takes, and of one float dtype."""
    yield from check_zero_point(node, parser)
    codes, scale, result = node.inputs[0], node.inputs[1], node.outputs[0]
    if codes is None or scale is None:
        return
    if None not in (scale.dtype, result.dtype) and scale.dtype != result.dtype:
        yield (
            f"the scale is {dtype_name(scale)} and the result {dtype_name(result)}",
            "give both the same dtype",
        )
    yield from _check_scale_shape(node, codes, scale)
    if not parser.capabilities.any_scales and codes.dtype in _QUANTIZED_DTYPES and is_constant(codes):
        yield from _check_weight_scales(node, codes, scale)


def _check_scale_shape(node: ir.Node, codes: ir.Value, scale: ir.Value) -> Problems:
    """One scale, a scale for each index of `axis`, or blocks, which TensorRT reads from the scale's shape.

    From the parser of TensorRT 10 and later; a scale of the weight's rank divides it into blocks along one
    axis.
    """
    shape, scales = fixed_shape(codes), fixed_shape(scale)
    if shape is None or scales is None or np.prod(scales) == 1:
        return
    form = f"the weight is of shape {list(shape)} and the scale of shape {list(scales)}"
    axis = int(number(node, "axis", 1))
    if len(scales) == 1:
        if not -len(shape) <= axis < len(shape) or shape[axis] != scales[0]:
            yield f"{form}: not a scale for each index of axis {axis}", "give each index of the axis a scale"
        return
    blocked = [index for index, pair in enumerate(zip(shape, scales, strict=False)) if pair[0] != pair[1]]
    if len(scales) != len(shape) or len(blocked) != 1 or shape[blocked[0]] % scales[blocked[0]]:
        yield (
            f"{form}: not whole blocks along exactly one axis",
            "make blocks along one axis that they divide",
        )
        return
    size, given = shape[blocked[0]] // scales[blocked[0]], int(number(node, "block_size", 0))
    if size != given or blocked[0] != axis % len(shape):
        yield (
            f"{form}: blocks of {size} along axis {blocked[0]}, which TensorRT computes, and the node has "
            f"blocks of {given} along axis {axis}",
            "give block_size and axis of the scale's shape",
        )


def _check_weight_scales(node: ir.Node, codes: ir.Value, scale: ir.Value) -> Problems:
    """Full TensorRT takes positive constant scales, blocks of INT4 alone, and even rows of INT4."""
    scales, blocked = constant(node, 1), _has_blocks(codes, scale)
    if scales is None:
        yield f"the scale {scale.name} is not constant", "make it an initializer"
    elif not (scales.astype(np.float32) > 0).all():
        yield f"the scale {scale.name} is not greater than 0 everywhere", "quantise with positive scales"
    if codes.dtype == ir.DataType.INT8 and blocked:
        yield "INT8 with several scales in a row", "give each output one scale, or use INT4"
    if codes.dtype == ir.DataType.INT4:
        if not blocked:
            yield "INT4 without blocks", "give each block of 128, 64 or 32 numbers a scale, or use INT8"
        if codes.shape is not None and isinstance(codes.shape[-1], int) and codes.shape[-1] % 2:
            yield f"the last dimension of INT4 is {codes.shape[-1]}, which is odd", "use INT8, or pad it"


def _has_blocks(codes: ir.Value, scale: ir.Value) -> bool:
    """Whether scales have the rank of the codes: TensorRT finds the blocks from their shape."""
    return codes.shape is not None and scale.shape is not None and len(scale.shape) == len(codes.shape) > 1


def check_zero_point(node: ir.Node, parser: Parser) -> Problems:
    """The zero point of a quantisation must be the constant 0."""
    point = node.inputs[2] if len(node.inputs) > 2 else None
    if point is None or point.dtype in (ir.DataType.UINT4, ir.DataType.UINT8):
        return  # check_dtype reports these dtypes
    values = ir.convenience.get_const_tensor(point)
    if values is None or np.any(values.numpy().astype(np.float32)):
        yield f"the zero point {point.name} is not the constant 0", "quantise symmetrically"
