"""Graphs of one or two nodes, with the problem that lint must report for TensorRT-RTX or another TensorRT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from kvexport.graph.lint import Parser

F16, F32, BF16, F64 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.DOUBLE
I64, I32, I8, U8, I16 = (
    TensorProto.INT64,
    TensorProto.INT32,
    TensorProto.INT8,
    TensorProto.UINT8,
    TensorProto.INT16,
)
BOOL, I4, U4 = TensorProto.BOOL, TensorProto.INT4, TensorProto.UINT4
Typed = tuple[str, int, Sequence[Any] | None]

RTX = Parser("tensorrt-rtx", (1, 7, 1))


def graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Typed],
    outputs: Sequence[Typed],
    constants: Sequence[onnx.TensorProto] = (),
    *,
    opset: int = 24,
) -> ir.Model:
    """A model whose values have the shapes and dtypes that ONNX infers."""
    imports = [helper.make_opsetid("", opset)]
    imports += [helper.make_opsetid(domain, 1) for domain in sorted({node.domain for node in nodes} - {""})]
    typed = [[helper.make_tensor_value_info(*each) for each in values] for values in (inputs, outputs)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", *typed, list(constants)), opset_imports=imports, ir_version=12
    )
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def one(
    op: str, dtype: int = F16, *, opset: int = 24, domain: str = "", outputs: int = 1, **attributes: Any
) -> ir.Model:
    """A graph of one operator of one input."""
    names = ["y", "z", "w"][:outputs]
    node = helper.make_node(op, ["x"], names, name="node", domain=domain, **attributes)
    return graph([node], [("x", dtype, (1, 4, 16))], [(name, dtype, None) for name in names], opset=opset)


def attention(
    q: Sequence[Any] = (1, 4, 2, 16),
    k: Sequence[Any] = (1, 2, 32, 16),
    v: Sequence[Any] | None = None,
    *,
    dtype: int = F16,
    mask: Sequence[Any] | None = (1, 1, 2, 32),
    mask_dtype: int = BOOL,
    outputs: int = 1,
    past: bool = False,
    lengths: bool = False,
    **attributes: Any,
) -> ir.Model:
    inputs: list[Typed] = [("q", dtype, q), ("k", dtype, k), ("v", dtype, v or k)]
    names = [
        "q",
        "k",
        "v",
        "mask" if mask else "",
        "past_k" if past else "",
        "past_v" if past else "",
        "lengths",
    ]
    if mask:
        inputs.append(("mask", mask_dtype, mask))
    if past:
        inputs += [(name, dtype, (k[0], k[1], 8, k[3])) for name in ("past_k", "past_v")]
    if lengths:
        inputs.append(("lengths", I64, (1,)))
    results = ["y", "present_k", "present_v", "products"][:outputs]
    node = helper.make_node(
        "Attention",
        names if lengths else names[:6] if past else names[:4],
        results,
        name="node",
        **attributes,
    )
    return graph([node], inputs, [(name, dtype, None) for name in results])


def rotary(table: int = F16, positions: int = I64) -> ir.Model:
    inputs: list[Typed] = [
        ("x", F16, (1, 4, 2, 16)),
        ("cos", table, (32, 8)),
        ("sin", table, (32, 8)),
        ("at", positions, (1, 2)),
    ]
    node = helper.make_node("RotaryEmbedding", ["x", "cos", "sin", "at"], ["y"], name="node")
    return graph([node], inputs, [("y", F16, None)])


def scatter(
    cache: Sequence[Any] = (1, 2, 32, 16),
    new: Sequence[Any] = (1, 2, 4, 16),
    dtype: int = F16,
    *,
    axis: int = -2,
    mode: str = "linear",
    is_input: bool = True,
    is_output: bool = True,
) -> ir.Model:
    nodes = [
        helper.make_node(
            "TensorScatter", ["cache", "new", "at"], ["written"], name="node", axis=axis, mode=mode
        )
    ]
    inputs: list[Typed] = [("cache", dtype, cache), ("new", dtype, new), ("at", I64, (1,))]
    outputs: list[Typed] = [("written", dtype, None)]
    if not is_input:
        nodes.insert(0, helper.make_node("Relu", ["before"], ["cache"], name="before"))
        inputs[0] = ("before", dtype, cache)
    if not is_output:
        nodes.append(helper.make_node("Relu", ["written"], ["after"], name="after"))
        outputs = [("after", dtype, None)]
    return graph(nodes, inputs, outputs)


def dequantised(
    dtype: int = I8, point: int | None = None, block: int | None = None, scale: int = F16, opset: int = 24
) -> ir.Model:
    shape = (64, 32)
    scales = (32,) if block is None else (64 // block, 32)
    constants = [
        helper.make_tensor("w", dtype, shape, [1] * 2048),
        helper.make_tensor("scale", scale, scales, [0.5] * int(np.prod(scales))),
    ]
    if point is not None:
        constants.append(helper.make_tensor("point", dtype, scales, [point] * int(np.prod(scales))))
    attributes = {"axis": 1} if block is None else {"axis": 0, "block_size": block}
    nodes = [
        helper.make_node(
            "DequantizeLinear", [constant.name for constant in constants], ["d"], name="node", **attributes
        ),
        helper.make_node("MatMul", ["x", "d"], ["y"], name="product"),
    ]
    return graph(nodes, [("x", scale, (1, 4, 64))], [("y", scale, None)], constants, opset=opset)


def weights(
    dtype: int = I4,
    shape: Sequence[int] = (64, 32),
    *,
    scales: Sequence[int] = (2, 32),
    axis: int = 0,
    block: int | None = 32,
    scale: int = F16,
    value: float = 0.5,
    to: int | None = None,
    transposed: bool = False,
    constant: bool = True,
    as_node: bool = False,
) -> ir.Model:
    """A linear map whose weight is dequantised by scales of another form than `dequantised` has.

    With `as_node` the weight is the output of a node Constant, not an initializer.
    """
    weight = helper.make_tensor("w", dtype, shape, [1] * int(np.prod(shape)))
    constants = [] if as_node else [weight]
    inputs: list[Typed] = [("x", to or scale, (1, 4, 64))]
    if constant:
        constants.append(helper.make_tensor("scale", scale, scales, [value] * int(np.prod(scales))))
    else:
        inputs.append(("scale", scale, scales))
    attributes = {"axis": axis} | ({} if block is None else {"block_size": block})
    attributes |= {} if to is None else {"output_dtype": to}
    names = ["before", "node"] if not transposed else ["node", "after"]
    nodes = [helper.make_node("Constant", [], ["w"], name="stored", value=weight)] if as_node else []
    if transposed:
        nodes.append(helper.make_node("Transpose", ["w"], ["t"], name=names[0], perm=[1, 0]))
    nodes += [
        helper.make_node(
            "DequantizeLinear", ["t" if transposed else "w", "scale"], ["d"], name=names[1], **attributes
        ),
        helper.make_node("MatMul", ["x", "d"], ["y"], name="product"),
    ]
    return graph(nodes, inputs, [("y", to or scale, None)], constants)


def gathered(dtype: int) -> ir.Model:
    """Rows of a table of integers, which are dequantised afterwards."""
    constants = [
        helper.make_tensor("w", dtype, (16, 32), [1] * 512),
        helper.make_tensor("scale", F16, (), [0.5]),
    ]
    nodes = [
        helper.make_node("Gather", ["w", "rows"], ["g"], name="node"),
        helper.make_node("DequantizeLinear", ["g", "scale"], ["y"], name="after"),
    ]
    return graph(nodes, [("rows", I64, (1, 4))], [("y", F16, None)], constants)


def quantised(point: int) -> ir.Model:
    constants = [helper.make_tensor("scale", F16, (), [0.5]), helper.make_tensor("point", I8, (), [point])]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "point"], ["q"], name="node"),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["y"], name="back"),
    ]
    return graph(nodes, [("x", F16, (4, 4))], [("y", F16, None)], constants)


def top_k(count: int) -> ir.Model:
    node = helper.make_node("TopK", ["x", "k"], ["y", "at"], name="node")
    constants = [helper.make_tensor("k", I64, (1,), [count])]
    return graph([node], [("x", F32, (1, 8192))], [("y", F32, None), ("at", I64, None)], constants)


def axes(op: str, constant: bool) -> ir.Model:
    node = helper.make_node(op, ["x", "axes"], ["y"], name="node")
    inputs: list[Typed] = [("x", F16, (1, 4, 16))]
    if constant:
        return graph([node], inputs, [("y", F16, None)], [helper.make_tensor("axes", I64, (1,), [0])])
    return graph([node], [*inputs, ("axes", I64, (1,))], [("y", F16, None)])


def scatter_nd(reduction: str) -> ir.Model:
    node = helper.make_node("ScatterND", ["x", "at", "new"], ["y"], name="node", reduction=reduction)
    return graph(
        [node], [("x", F16, (4, 16)), ("at", I64, (2, 1)), ("new", F16, (2, 16))], [("y", F16, None)]
    )


def layer_norm(outputs: int) -> ir.Model:
    names = ["y", "mean", "deviation"][:outputs]
    node = helper.make_node("LayerNormalization", ["x", "weight"], names, name="node")
    typed = [(name, F16 if name == "y" else F32, None) for name in names]
    return graph([node], [("x", F16, (1, 4, 16)), ("weight", F16, (16,))], typed)


@dataclass(frozen=True)
class Case:
    """A graph, and part of the problem that lint reports (None: no problem)."""

    make: Callable[[], ir.Model]
    problem: str | None


def case(problem: str | None, make: Callable[..., ir.Model], *arguments: Any, **options: Any) -> Case:
    return Case(lambda: make(*arguments, **options), problem)


# Graphs that TensorRT-RTX builds, and graphs that its parser or builder does not take.
RTX_CASES = {
    "attention": case(None, attention),
    "attention, no mask": case(None, attention, mask=None),
    "attention, is_causal": case(None, attention, mask=None, is_causal=1),
    "attention, mask and is_causal": case("attn_mask together with is_causal", attention, is_causal=1),
    "attention, additive mask": case(None, attention, mask_dtype=F16),
    "attention, bias of each head": case(None, attention, mask=(1, 4, 2, 32), mask_dtype=F16),
    "attention, mask of another dtype": case("attn_mask is FLOAT", attention, mask_dtype=F32),
    "attention, bfloat16": case(None, attention, dtype=BF16),
    "attention, scale": case(None, attention, scale=0.5),
    "attention, symbolic": case(None, attention, ("b", 4, "s", 16), ("b", 2, 32, 16), mask=("b", 1, "s", 32)),
    "attention, softcap": case("softcap", attention, softcap=30.0),
    "attention, softcap 0": case(None, attention, softcap=0.0),
    "attention, softmax_precision": case("softmax_precision", attention, softmax_precision=1),
    "attention, past": case("past keys", attention, past=True),
    "attention, presents": case("more than one output", attention, past=True, outputs=3),
    "attention, products": case("more than one output", attention, outputs=4, past=True),
    "attention, narrower values": case("16 wide and values 24", attention, v=(1, 2, 32, 24)),
    "attention, heads that do not divide": case("5 query heads", attention, (1, 5, 2, 16)),
    "attention, heads of 12": case("heads of 12 with a bool mask", attention, (1, 4, 2, 12), (1, 2, 32, 12)),
    "attention, heads of 36": case("heads of 36 with a bool mask", attention, (1, 4, 2, 36), (1, 2, 32, 36)),
    "attention, heads of 36, additive mask": case(
        None, attention, (1, 4, 2, 36), (1, 2, 32, 36), mask_dtype=F16
    ),
    "attention, heads of 36, no mask": case(None, attention, (1, 4, 2, 36), (1, 2, 32, 36), mask=None),
    "rotary": case(None, rotary),
    "rotary, tables of another dtype": case("table cos is FLOAT", rotary, F32),
    "scatter": case(None, scatter),
    "scatter, axis 2": case(None, scatter, axis=2),
    "scatter, float32": case(None, scatter, dtype=F32),
    "scatter, bfloat16": case(None, scatter, dtype=BF16),
    "scatter, symbolic new": case(None, scatter, new=(1, 2, "s", 16)),
    "scatter, symbolic batch": case(None, scatter, ("b", 2, 32, 16), ("b", 2, 4, 16)),
    "scatter, symbolic capacity": case("capacity of the cache cache is not fixed", scatter, (1, 2, "c", 16)),
    "scatter, circular": case("mode circular", scatter, mode="circular"),
    "scatter, 3 dimensions": case("3 dimensions", scatter, (1, 32, 16), (1, 4, 16)),
    "scatter, axis 1": case("axis 1", scatter, (1, 32, 2, 16), (1, 4, 2, 16), axis=1),
    "scatter, int8": case("the cache is INT8", scatter, dtype=I8),
    "scatter, int32": case("the cache is INT32", scatter, dtype=I32),
    "scatter, no input": case("not an input", scatter, is_input=False),
    "scatter, no output": case("not an output", scatter, is_output=False),
    "int8": case(None, dequantised),
    "int8, zero point 0": case(None, dequantised, point=0),
    "int8, zero point 3": case("not the constant 0", dequantised, point=3),
    "int8, blocks": case(None, dequantised, block=32),
    "int4, blocks": case(None, dequantised, I4, block=32),
    "int4, blocks of 128": case(None, dequantised, I4, block=64),
    "int4, zero point 1": case("not the constant 0", dequantised, I4, 1, 32),
    "int4, scale of another dtype": case(
        "the scale is FLOAT and the result FLOAT16", weights, scale=F32, to=F16
    ),
    "int4, transposed": case("only DequantizeLinear may read", weights, shape=(32, 64), transposed=True),
    "int8, transposed": case(
        "only DequantizeLinear may read",
        weights,
        I8,
        (32, 64),
        scales=(32,),
        axis=1,
        block=None,
        transposed=True,
    ),
    "int8, gathered": case("only DequantizeLinear may read", gathered, I8),
    "int4, gathered": case("only DequantizeLinear may read", gathered, I4),
    "int4, transposed constant node": case(
        "only DequantizeLinear may read", weights, shape=(32, 64), as_node=True, transposed=True
    ),
    "int4, constant node": case(None, weights, as_node=True),
    "int4, blocks along two axes": case("along exactly one axis", weights, scales=(2, 16)),
    "int8, blocks along two axes": case("along exactly one axis", weights, I8, scales=(2, 16)),
    "int4, blocks of 1": case("along exactly one axis", weights, scales=(64, 32), block=1),
    "int4, blocks that do not divide": case("along exactly one axis", weights, scales=(5, 32), block=13),
    "int4, more scales than weights": case("along exactly one axis", weights, scales=(128, 32)),
    "int4, scales of 3 dimensions": case("along exactly one axis", weights, scales=(1, 2, 32)),
    "int8, half of the scales": case("index of axis 1", weights, I8, scales=(16,), axis=1, block=None),
    "int8, a scale for each input": case(None, weights, I8, scales=(64,), axis=0, block=None),
    "int8, one scale": case(None, weights, I8, scales=(), block=None),
    "uint4": case("UINT4", dequantised, U4, None, 32),
    "uint8": case("UINT8", dequantised, U8, 0),
    "quantise": case(None, quantised, 0),
    "quantise, zero point 3": case("not the constant 0", quantised, 3),
    "top 3840": case(None, top_k, 3840),
    "top 3841": case("K is 3841", top_k, 3841),
    **{
        f"{op}, {what}": case(problem, axes, op, what == "constant")
        for op in ("Squeeze", "ReduceSum")
        for what, problem in (("constant", None), ("axes given", "axes are not constant"))
    },
    "scatter_nd": case(None, scatter_nd, "none"),
    "scatter_nd, add": case("reduction add", scatter_nd, "add"),
    "layer norm": case(None, layer_norm, 1),
    "layer norm, mean": case("more than one output", layer_norm, 3),
    "Swish": case(None, one, "Swish"),
    "Gelu": case(None, one, "Gelu"),
    "no importer": case("no TensorRT-RTX imports it", one, "BitwiseNot", I32),
    "contrib": case("domain com.microsoft", one, "FastGelu", domain="com.microsoft"),
    "int16": case("INT16", one, "Abs", I16),
    "uint8 to Relu": case("UINT8", one, "Abs", U8),
    "uint8 to Cast": case(None, one, "Cast", U8, to=U8),
    "float64": case(None, one, "Relu", F64),
    "opset 26": case(None, one, "Relu", opset=26),
}

# Graphs that TensorRT-RTX builds only with TRT_decomposable: no fused kernel exists.
UNFUSED = {
    "float32": case("FLOAT", attention, dtype=F32),
    **{
        f"heads of {width}": case(f"heads of {width}", attention, (1, 4, 2, width), (1, 2, 32, width))
        for width in (4, 8, 260, 264, 512)
    },
    "a single head": case("a single head", attention, (4, 1, 2, 64), (4, 1, 32, 64), mask=(4, 1, 2, 32)),
    "a single head of float32": case("a single head", attention, (1, 1, 2, 16), (1, 1, 32, 16), dtype=F32),
    "heads of 36, one token": case(
        "heads of 36", attention, (1, 4, 1, 36), (1, 2, 32, 36), mask=(1, 1, 1, 32), mask_dtype=F16
    ),
    "heads of 36, no mask": case("heads of 36", attention, (1, 4, 1, 36), (1, 2, 32, 36), mask=None),
}

# Graphs that TensorRT-RTX builds, but computes wrongly.
WRONG = {
    "lengths": case("nonpad_kv_seqlen", attention, mask=None, lengths=True),
    "blocks that the attribute contradicts": case("blocks of 16 along axis 0", weights, scales=(4, 32)),
    "blocks without the attribute": case("has blocks of 0", weights, block=None),
    "an operator of another domain": case("domain my.own", one, "Relu", domain="my.own"),
}

# Graphs that other versions do not take by their documents; not measured. TensorRT-RTX takes all of them.
T103, T1013, T1014, T1016 = (
    Parser("tensorrt", version) for version in ((10, 3, 0), (10, 13, 3), (10, 14), (10, 16, 2))
)
T11 = Parser("tensorrt", (11, 4, 1))
OLDER_CASES: dict[str, tuple[Parser, Parser | None, Case]] = {  # refused by the first, taken by the second
    "Attention": (T1013, T1016, case("TensorRT 10.14", attention)),
    "RotaryEmbedding": (T1014, T1016, case("TensorRT 10.15", rotary)),
    "TensorScatter": (T1014, T1016, case("TensorRT 10.15", scatter)),
    "Swish": (T1016, T11, case("TensorRT 11.0", one, "Swish")),
    "opset 24": (T1013, T1016, case("opset 24", one, "Relu")),
    "opset 22": (T103, T1013, case("opset 22", one, "Relu", opset=22)),
    "scales that are given": (T1013, RTX, case("is not constant", weights, constant=False)),
    "negative scales": (T11, RTX, case("not greater than 0", weights, value=-0.5)),
    "a scale of 0": (T11, RTX, case("not greater than 0", weights, value=0.0)),
    "INT8 in blocks": (T11, RTX, case("several scales in a row", weights, I8)),
    "INT4 without blocks": (
        T11,
        RTX,
        case("INT4 without blocks", weights, scales=(32,), axis=1, block=None),
    ),
    "odd INT4": (T11, RTX, case("which is odd", weights, shape=(64, 31), scales=(2, 31))),
    "opset 26": (T11, RTX, case("opset 26", one, "Relu", opset=26)),
    "Gelu in opset 17": (T103, None, case("opset 17 has no such operator", one, "Gelu", opset=17)),
    "int32 positions": (T11, RTX, case("position_ids are INT32", rotary, positions=I32)),
    "mask of 2 dimensions": (T11, RTX, case("attn_mask has 2 dimensions", attention, mask=(2, 32))),
    "products of another mode": (T11, RTX, case("qk_matmul_output_mode", attention, qk_matmul_output_mode=1)),
}

# Graphs that break one rule about integer weights, in every version of the full TensorRT.
INTEGER_CASES = {
    name: each
    for name, each in (RTX_CASES | WRONG | {name: each for name, (*_, each) in OLDER_CASES.items()}).items()
    if each.problem is not None and any(node.op_type == "DequantizeLinear" for node in each.make().graph)
}
