"""Rules of lint: what TensorRT's ONNX parser and builder do not take, one function for each operator.

Each rule yields the problems of one node, with a remedy. Rules of integer weights are in
`kvexport.graph.lint_integers`. Which version of an engine takes what is in
`kvexport.devices.capabilities`. The tests run the parser and the builder of TensorRT-RTX 1.7.1 against every
rule about it.
"""

from __future__ import annotations

import onnx_ir as ir

from kvexport.devices.capabilities import first_tensorrt_with
from kvexport.graph.lint_integers import check_dequantize, check_zero_point
from kvexport.graph.lint_nodes import (
    Parser,
    Problems,
    Rule,
    constant,
    dtype_name,
    num_outputs,
    number,
    size_of,
)

_CACHE_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FUSED_DTYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_UNSUPPORTED_DTYPES = (
    "INT16",
    "UINT16",
    "UINT32",
    "UINT64",
    "STRING",
    "COMPLEX64",
    "COMPLEX128",
    "UINT4",
    "FLOAT8E5M2",
)
_LARGEST_TOP_K = 3840
_DECOMPOSED = "--lowering decomposed17"
# Operators of std24 that decomposed17 does without.
_DECOMPOSED_OPERATORS = frozenset({"Attention", "RotaryEmbedding", "RMSNormalization", "TensorScatter"})


def check_operator(node: ir.Node, parser: Parser) -> Problems:
    """The parser must have an importer for the operator."""
    name = node.op_type
    if node.domain:  # the parser looks only at the name, and may import it as the default domain's operator
        yield (
            f"no importer for operators of the domain {node.domain}",
            "use the default domain's operators, or a lowering",
        )
    elif not parser.capabilities.imports(name):
        since = None if parser.engine == "tensorrt-rtx" else first_tensorrt_with(name)
        if since is None:
            yield f"no {parser.title} imports it", "build it from other operators"
        else:
            version = ".".join(map(str, since))
            alternative = f", or {_DECOMPOSED}" if name in _DECOMPOSED_OPERATORS else ""
            yield f"imported from TensorRT {version} on", f"TensorRT {version}{alternative}"


def check_dtype(node: ir.Node, parser: Parser) -> Problems:
    """TensorRT must have the dtype of each input and output."""
    for value in (*node.inputs, *node.outputs):
        if value is None or value.dtype is None:
            continue
        if value.dtype.name in _UNSUPPORTED_DTYPES:
            yield f"{value.name} is {value.dtype.name}, which TensorRT does not have", "use another dtype"
        elif value.dtype == ir.DataType.FLOAT4E2M1 and not parser.capabilities.float4:
            yield f"{value.name} is FLOAT4E2M1", "use TensorRT 10.8 or later, or INT4"
        elif value.dtype == ir.DataType.UINT8 and value in node.inputs and node.op_type != "Cast":
            yield f"{value.name} is UINT8, which only Cast takes", "use INT8"


def check_attention(node: ir.Node, parser: Parser) -> Problems:
    """Attention must have the form of TensorRT's own attention layer."""
    inputs = [*node.inputs, *[None] * (7 - len(node.inputs))]
    query, key, value, mask, past_key, past_value, lengths = inputs
    if num_outputs(node) > 1:
        yield (
            "more than one output is not supported",
            "keep the cache outside of Attention, in a TensorScatter",
        )
    if past_key is not None or past_value is not None:
        yield (
            "past keys and values as inputs are not supported",
            "keep the cache outside of Attention, in a TensorScatter",
        )
    if lengths is not None:
        yield (
            "nonpad_kv_seqlen is not supported: TensorRT 11.1 and 11.2 do not build it in float16, and "
            "compute it wrongly in bfloat16",
            "use an explicit mask",
        )
    if number(node, "softcap", 0.0):
        yield "the attribute softcap is not supported", _DECOMPOSED
    if "softmax_precision" in node.attributes:
        yield "the attribute softmax_precision is not supported", "leave it out"
    if number(node, "is_causal", 0) and mask is not None:
        yield "attn_mask together with is_causal is not supported", "make the mask causal, and is_causal 0"
    if not parser.capabilities.attention_any_rank:
        for name, tensor in (("Q", query), ("K", key), ("V", value), ("attn_mask", mask)):
            if tensor is not None and tensor.shape is not None and len(tensor.shape) != 4:
                yield (
                    f"{name} has {len(tensor.shape)} dimensions, and TensorRT takes 4",
                    "reshape it to 4 dimensions",
                )
    if not parser.capabilities.qk_matmul_output_mode and number(node, "qk_matmul_output_mode", 0):
        yield "the attribute qk_matmul_output_mode is not supported", "leave it out"
    if mask is not None and query is not None and mask.dtype not in (None, ir.DataType.BOOL, query.dtype):
        yield (
            f"attn_mask is {dtype_name(mask)} and Q is {dtype_name(query)}",
            "give attn_mask the dtype of Q, or BOOL",
        )
    heads, kv_heads = size_of(query, 1, 4), size_of(key, 1, 4)
    if heads and kv_heads and heads % kv_heads:
        yield f"{heads} query heads are not a multiple of {kv_heads} KV heads", _DECOMPOSED
    key_dim, value_dim = size_of(key, 3, 4), size_of(value, 3, 4)
    if key_dim != value_dim and key_dim and value_dim:
        yield f"keys are {key_dim} wide and values {value_dim}, and TensorRT takes one width", _DECOMPOSED
    elif key_dim and _is_padded(query, key_dim) and mask is not None and mask.dtype == ir.DataType.BOOL:
        yield (
            f"heads of {key_dim} with a bool mask: TensorRT pads them to a multiple of 8, "
            "and then does not build",
            f"{_DECOMPOSED}, or a multiple of 8, or an additive mask",
        )


def check_fused_kernel(node: ir.Node, parser: Parser) -> Problems:
    """Attention must have a fused kernel, or it builds only with the attribute TRT_decomposable."""
    if node.op_type != "Attention" or not parser.capabilities.imports("Attention"):
        return
    query = node.inputs[0]
    head_dim = size_of(query, 3, 4)
    if size_of(query, 1, 4) == 1:
        yield (
            "no fused attention kernel for a single head",
            "it is decomposed; two heads or more have fused kernels",
        )
    elif query is not None and query.dtype not in (None, *_FUSED_DTYPES):
        yield (
            f"no fused attention kernel takes {dtype_name(query)}",
            "it is decomposed; FLOAT16 and BFLOAT16 have fused kernels",
        )
    elif head_dim and (head_dim % 8 or not 16 <= head_dim <= 256):
        yield (
            f"no fused attention kernel for heads of {head_dim} and one token",
            "it is decomposed; heads of 16, 24, ... 256 have fused kernels",
        )


def _is_padded(query: ir.Value | None, head_dim: int) -> bool:
    """Whether the fused kernel for several tokens pads heads of this width to the next multiple of 8."""
    return query is not None and query.dtype in _FUSED_DTYPES and 8 < head_dim < 256 and head_dim % 8 != 0


def check_rotary_embedding(node: ir.Node, parser: Parser) -> Problems:
    """The tables must have the dtype of the input, and position_ids INT64."""
    x, *rest = node.inputs
    for table in rest[:2]:
        if table is None or x is None or table.dtype is None or x.dtype is None:
            continue
        if table.dtype != x.dtype:
            yield (
                f"the table {table.name} is {dtype_name(table)} and the input is {dtype_name(x)}",
                "give both the same dtype",
            )
    positions = rest[2] if len(rest) > 2 else None
    if parser.capabilities.int32_positions or positions is None:
        return
    if positions.dtype not in (None, ir.DataType.INT64):
        yield f"position_ids are {dtype_name(positions)}", "make them INT64"


def check_tensor_scatter(node: ir.Node, parser: Parser) -> Problems:
    """TensorScatter must update a 4-D cache in place: graph input and output, written along axis -2."""
    cache, result = node.inputs[0], node.outputs[0]
    assert cache is not None
    axis, rank = int(number(node, "axis", -2)), None if cache.shape is None else len(cache.shape)
    mode = node.attributes.get("mode")
    if mode is not None and mode.as_string() != "linear":
        yield f"mode {mode.as_string()} is not supported", "use mode linear"
    if rank not in (None, 4):
        yield (
            f"the cache has {rank} dimensions, and TensorRT takes 4",
            "make it [batch, heads, capacity, width]",
        )
    elif axis not in (-2, 2):
        yield f"it writes along axis {axis}", "make the cache [batch, heads, capacity, width], and axis -2"
    elif cache.shape is not None and not isinstance(cache.shape[2], int):
        yield (
            f"the capacity of the cache {cache.name} is not fixed",
            "fix it before parsing (`kvexport engine` does)",
        )
    if cache.dtype not in (None, *_CACHE_DTYPES):
        yield f"the cache is {dtype_name(cache)}", "use FLOAT, FLOAT16 or BFLOAT16"
    if not cache.is_graph_input():
        yield f"the cache {cache.name} is not an input of the graph", "make it an input"
    if not result.is_graph_output():
        yield f"the result {result.name} is not an output of the graph", "make it an output"


def check_top_k(node: ir.Node, parser: Parser) -> Problems:
    """K of TopK has a limit."""
    count = constant(node, 1)
    if count is not None and int(count.max()) > _LARGEST_TOP_K:
        yield f"K is {int(count.max())}, more than {_LARGEST_TOP_K}", f"use {_LARGEST_TOP_K} at most"


def check_constant_axes(node: ir.Node, parser: Parser) -> Problems:
    """Axes must be known when the engine is built."""
    if len(node.inputs) > 1 and node.inputs[1] is not None and constant(node, 1) is None:
        yield f"the axes {node.inputs[1].name} are not constant", "make them an initializer"


def check_scatter_nd(node: ir.Node, parser: Parser) -> Problems:
    """ScatterND must have no reduction."""
    reduction = node.attributes.get("reduction")
    if reduction is not None and reduction.as_string() != "none":
        yield f"reduction {reduction.as_string()} is not supported", "scatter without reduction"


def check_layer_normalization(node: ir.Node, parser: Parser) -> Problems:
    """LayerNormalization must not have its mean or deviation as outputs."""
    if num_outputs(node) > 1:
        yield "more than one output is not supported", "compute mean and deviation with other operators"


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
# Rules by operator of the default domain.
RULES: dict[str, Rule] = {
    "Attention": check_attention,
    "RotaryEmbedding": check_rotary_embedding,
    "TensorScatter": check_tensor_scatter,
    "DequantizeLinear": check_dequantize,
    "QuantizeLinear": check_zero_point,
    "TopK": check_top_k,
    "ScatterND": check_scatter_nd,
    "LayerNormalization": check_layer_normalization,
    **dict.fromkeys(("Squeeze", "Unsqueeze", *_REDUCTIONS), check_constant_axes),
}
