"""What TensorRT's ONNX parser and builder refuse, rule by rule: operators as a table, the rest as one function each.

Knows operators, their attributes, ranks, sizes and dtypes; must not know what a bundle is or where a graph came from.
Sources: the change log and operators.md of onnx/onnx-tensorrt up to 10.15, NVIDIA/TensorRT's CHANGELOG for 11.0, NVIDIA's
ONNX opset guide for 11.x. TensorRT-RTX 1.7.1 was asked about every rule that concerns it; tests ask it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

Version = tuple[int, ...]

# Imported by 10.3, the oldest that kvexport builds with.
_NAMES = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast CastLike Ceil Celu Clip
    Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DeformConv DepthToSpace DequantizeLinear Div Dropout
    Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool
    GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Hardmax Identity If
    InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop
    LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not
    OneHot Or PRelu Pad Pow QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal
    ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu
    Reshape Resize ReverseSequence RoiAlign Round Scan Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin
    Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK
    Transpose Trilu Unsqueeze Upsample Where Xor
"""
_BY_10_3 = frozenset(_NAMES.split())
_ADDED: dict[str, Version] = {
    "BlackmanWindow": (10, 4),
    "HammingWindow": (10, 4),
    "HannWindow": (10, 4),
    "STFT": (10, 5),
    "Attention": (10, 14),
    "RotaryEmbedding": (10, 15),
    "RMSNormalization": (10, 15),
    "TensorScatter": (10, 15),
    "Swish": (11, 0),
}
_LOWERED = frozenset(
    {"Attention", "RotaryEmbedding", "RMSNormalization", "TensorScatter"}
)  # what decomposed17 has none of
_RTX_LACKS = frozenset({"DeformConv"})
_RTX_HAS = frozenset({"CausalConvWithState", "LinearAttention"})

# Newest opset that a version reads: 10.6 and 10.11 took over ONNX 1.17 and 1.18; 10.15 and 11 say theirs. What 10.3 reads
# is written nowhere that we found (its ONNX is between 1.14 and 1.17, opsets 19 to 22): 20 is remembered, not tried.
_OPSETS: tuple[tuple[Version, int], ...] = (
    ((11, 0), 25),
    ((10, 15), 24),
    ((10, 11), 23),
    ((10, 6), 22),
    ((10, 3), 20),
)

_CACHE_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FUSED_DTYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_NEVER = ("INT16", "UINT16", "UINT32", "UINT64", "STRING", "COMPLEX64", "COMPLEX128", "UINT4", "FLOAT8E5M2")
_TOPK = 3840
_DECOMPOSED = "--lowering decomposed17"


@dataclass(frozen=True)
class Parser:
    """The parser that is asked: "tensorrt" of a version, or "tensorrt-rtx", whose parser is that of TensorRT 11."""

    engine: str
    version: Version

    @property
    def rtx(self) -> bool:
        return self.engine == "tensorrt-rtx"

    def reached(self, version: Version) -> bool:
        return self.rtx or self.version >= version

    def __str__(self) -> str:
        return f"{'TensorRT-RTX' if self.rtx else 'TensorRT'} {'.'.join(map(str, self.version))}"


@dataclass(frozen=True)
class Finding:
    """One thing that a parser or builder refuses (or, as a `note`, does slowly), with what helps."""

    node: str
    operator: str
    problem: str
    remedy: str
    note: bool = False


Said = Iterator[tuple[str, str]]  # problem, remedy
Rule = Callable[[ir.Node, Parser], Said]


def newest_opset(parser: Parser) -> int | None:
    """The newest opset that it reads; None where none is known to be too new."""
    return (
        None
        if parser.rtx
        else next((opset for since, opset in _OPSETS if parser.version >= since), _OPSETS[-1][1])
    )


def operator(node: ir.Node, parser: Parser) -> Said:
    """It has no importer for the operator."""
    name = node.op_type
    if node.domain:  # the parser goes by the name alone, and may take it for the default domain's operator
        yield (
            f"no importer for operators of the domain {node.domain}",
            "use the default domain's operators, or a lowering",
        )
    elif parser.rtx:
        if name in _RTX_LACKS or not (name in _BY_10_3 or name in _ADDED or name in _RTX_HAS):
            yield "no TensorRT-RTX imports it", "build it from other operators"
    elif name in _ADDED:
        if parser.version < _ADDED[name]:
            since = ".".join(map(str, _ADDED[name]))
            lowered = f", or {_DECOMPOSED}" if name in _LOWERED else ""
            yield f"imported from TensorRT {since} on", f"TensorRT {since}{lowered}"
    elif name not in _BY_10_3:
        yield "no TensorRT imports it", "build it from other operators"


def dtype(node: ir.Node, parser: Parser) -> Said:
    """A tensor is of a type that TensorRT does not have."""
    for value in (*node.inputs, *node.outputs):
        if value is None or value.dtype is None:
            continue
        if value.dtype.name in _NEVER:
            yield f"{value.name} is {value.dtype.name}, which TensorRT does not have", "use another dtype"
        elif value.dtype == ir.DataType.FLOAT4E2M1 and not parser.reached((10, 8)):
            yield f"{value.name} is FLOAT4E2M1", "use TensorRT 10.8 or later, or INT4"
        elif value.dtype == ir.DataType.UINT8 and value in node.inputs and node.op_type != "Cast":
            yield f"{value.name} is UINT8, which only Cast takes", "use INT8"


def attention(node: ir.Node, parser: Parser) -> Said:
    """`Attention` in another form than TensorRT's own layer has."""
    inputs = [*node.inputs, *[None] * (7 - len(node.inputs))]
    query, key, value, mask, past_key, past_value, lengths = inputs
    if len([output for output in node.outputs if output.name]) > 1:
        yield "it has more outputs than one", "keep the cache outside of it (TensorScatter)"
    if past_key is not None or past_value is not None:
        yield "it has past keys and values as inputs", "keep the cache outside of it (TensorScatter)"
    if lengths is not None:
        yield (
            "it has nonpad_kv_seqlen, which TensorRT 11.1 and 11.2 do not build in float16 and compute wrongly in bfloat16",
            "use an explicit mask",
        )
    if _number(node, "softcap", 0.0):
        yield "softcap", _DECOMPOSED
    if "softmax_precision" in node.attributes:
        yield "softmax_precision", "leave it out"
    if _number(node, "is_causal", 0) and mask is not None:
        yield "a mask together with is_causal", "make the mask causal, and is_causal 0"
    if not parser.rtx:
        for name, tensor in (("Q", query), ("K", key), ("V", value), ("attn_mask", mask)):
            if tensor is not None and tensor.shape is not None and len(tensor.shape) != 4:
                yield (
                    f"{name} has {len(tensor.shape)} dimensions, and TensorRT takes 4",
                    "reshape it to 4 dimensions",
                )
        if _number(node, "qk_matmul_output_mode", 0):
            yield "qk_matmul_output_mode", "leave it out"
    if mask is not None and query is not None and mask.dtype not in (None, ir.DataType.BOOL, query.dtype):
        yield (
            f"the mask is {_name(mask)} and the query {_name(query)}",
            "give the mask the query's dtype, or bool",
        )
    heads, kv_heads = _size(query, 1, 4), _size(key, 1, 4)
    if heads and kv_heads and heads % kv_heads:
        yield f"{heads} query heads are no multiple of {kv_heads} KV heads", _DECOMPOSED
    width, value_width = _size(key, 3, 4), _size(value, 3, 4)
    if width != value_width and width and value_width:
        yield f"keys are {width} wide and values {value_width}, and TensorRT takes one width", _DECOMPOSED
    elif width and _padded(query, width) and mask is not None and mask.dtype == ir.DataType.BOOL:
        yield (
            f"heads of {width} with a bool mask: TensorRT pads them to a multiple of 8, and then does not build",
            f"{_DECOMPOSED}, or a multiple of 8, or an additive mask",
        )


def unfused(node: ir.Node, parser: Parser) -> Said:
    """No fused kernel computes it: it builds only where it may be decomposed."""
    if node.op_type != "Attention" or not parser.reached(_ADDED["Attention"]):
        return
    query = node.inputs[0]
    width = _size(query, 3, 4)
    if _size(query, 1, 4) == 1:
        yield (
            "no fused attention kernel for a single head",
            "it is decomposed; two heads and more have fused kernels",
        )
    elif query is not None and query.dtype not in (None, *_FUSED_DTYPES):
        yield (
            f"no fused attention kernel takes {_name(query)}",
            "it is decomposed; FLOAT16 and BFLOAT16 have fused kernels",
        )
    elif width and (width % 8 or not 16 <= width <= 256):
        yield (
            f"no fused attention kernel for heads of {width} and one token",
            "it is decomposed; heads of 16, 24, ... 256 have fused kernels",
        )


def _padded(query: ir.Value | None, width: int) -> bool:
    """Whether a fused kernel takes several tokens of this width, padded to the next multiple of 8."""
    return query is not None and query.dtype in _FUSED_DTYPES and 8 < width < 256 and width % 8 != 0


def rotary(node: ir.Node, parser: Parser) -> Said:
    """`RotaryEmbedding` whose tables or positions have the wrong dtype."""
    x, *rest = node.inputs
    for table in rest[:2]:
        if (
            table is not None
            and x is not None
            and table.dtype != x.dtype
            and None not in (table.dtype, x.dtype)
        ):
            yield f"the table {table.name} is {_name(table)} and the input {_name(x)}", "give both one dtype"
    positions = rest[2] if len(rest) > 2 else None
    if not parser.rtx and positions is not None and positions.dtype not in (None, ir.DataType.INT64):
        yield f"position_ids are {_name(positions)}", "make them INT64"


def tensor_scatter(node: ir.Node, parser: Parser) -> Said:
    """`TensorScatter` that is no cache update in place."""
    cache, result = node.inputs[0], node.outputs[0]
    assert cache is not None
    axis, rank = int(_number(node, "axis", -2)), None if cache.shape is None else len(cache.shape)
    mode = node.attributes.get("mode")
    if mode is not None and mode.as_string() != "linear":
        yield f"mode {mode.as_string()}", "use mode linear"
    if rank not in (None, 4):
        yield (
            f"the cache has {rank} dimensions, and TensorRT takes 4",
            "make it [batch, heads, capacity, width]",
        )
    elif axis not in (-2, 2):
        yield f"it writes along axis {axis}", "make the cache [batch, heads, capacity, width], and axis -2"
    elif cache.shape is not None and not isinstance(cache.shape[2], int):
        yield (
            f"the cache {cache.name} has a capacity that is not fixed",
            "fix it before parsing (`kvexport engine` does)",
        )
    if cache.dtype not in (None, *_CACHE_DTYPES):
        yield f"the cache is {_name(cache)}", "use FLOAT, FLOAT16 or BFLOAT16"
    if not cache.is_graph_input():
        yield f"the cache {cache.name} is not an input of the graph", "make it an input"
    if not result.is_graph_output():
        yield f"the result {result.name} is not an output of the graph", "make it an output"


def quantised(node: ir.Node, parser: Parser) -> Said:
    """A zero point that is not zero."""
    point = node.inputs[2] if len(node.inputs) > 2 else None
    if point is None or point.dtype in (ir.DataType.UINT4, ir.DataType.UINT8):
        return  # said of the dtype
    values = ir.convenience.get_const_tensor(point)
    if values is None or np.any(values.numpy().astype(np.float32)):
        yield f"the zero point {point.name} is not constantly zero", "quantise symmetrically"


def top_k(node: ir.Node, parser: Parser) -> Said:
    """More than TensorRT sorts out."""
    count = _constant(node, 1)
    if count is not None and int(count.max()) > _TOPK:
        yield f"K is {int(count.max())}", f"use {_TOPK} at most"


def constant_axes(node: ir.Node, parser: Parser) -> Said:
    """Axes that are not known when the engine is built."""
    if len(node.inputs) > 1 and node.inputs[1] is not None and _constant(node, 1) is None:
        yield f"the axes {node.inputs[1].name} are not constant", "make them an initializer"


def scatter_nd(node: ir.Node, parser: Parser) -> Said:
    """A reduction."""
    reduction = node.attributes.get("reduction")
    if reduction is not None and reduction.as_string() != "none":
        yield f"reduction {reduction.as_string()}", "scatter without reduction"


def layer_norm(node: ir.Node, parser: Parser) -> Said:
    """Its mean or deviation as outputs."""
    if len([output for output in node.outputs if output.name]) > 1:
        yield "it has more outputs than one", "compute mean and deviation apart"


_REDUCTIONS = (
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
)
RULES: dict[str, Rule] = {
    "Attention": attention,
    "RotaryEmbedding": rotary,
    "TensorScatter": tensor_scatter,
    "DequantizeLinear": quantised,
    "QuantizeLinear": quantised,
    "TopK": top_k,
    "ScatterND": scatter_nd,
    "LayerNormalization": layer_norm,
    **dict.fromkeys(("Squeeze", "Unsqueeze", *_REDUCTIONS), constant_axes),
}  # of operators of the default domain


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value


def _name(value: ir.Value) -> str:
    return "of unknown dtype" if value.dtype is None else value.dtype.name


def _size(value: ir.Value | None, axis: int, rank: int) -> int | None:
    """A size that is known, of a value of that rank."""
    if value is None or value.shape is None or len(value.shape) != rank:
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def _constant(node: ir.Node, index: int) -> np.ndarray | None:
    value = node.inputs[index] if len(node.inputs) > index else None
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()
