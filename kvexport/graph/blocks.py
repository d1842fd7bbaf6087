"""One block, and its parts without a cache, as ONNX nodes: linear maps, norms, the MLP.

The reference is `kvexport.model.reference`. TensorRT's parser imports every operator used here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from kvexport.bundle.graph_io import attention_residual, attention_tap, residual_tap
from kvexport.graph.nodes import NodeBuilder, Nodes, sizes
from kvexport.graph.weights import NUMPY_DTYPES
from kvexport.model.decoder import Attention, Layer, Linear, Mlp, Norm


def linear(
    nodes: NodeBuilder, parameters: Linear, x: ir.Value, at: str, result: str | None = None
) -> ir.Value:
    """x [..., in] · weight [in, out] + bias.

    Args:
        at: prefix of the names of weight and bias.
        result: name of the result; None: `at`.
    """
    name, shape = result or at, (*sizes(x)[:-1], parameters.weight.shape[0])
    weight = nodes.matrix(f"{at}.weight", parameters.weight, parameters.codes, transposed=True)
    if parameters.bias is None:
        return nodes.op("MatMul", x, weight, name=name, shape=shape)
    product = nodes.op("MatMul", x, weight, name=f"{at}.product", shape=shape)
    return nodes.op("Add", product, nodes.weight(f"{at}.bias", np.asarray(parameters.bias)), name=name)


def norm(nodes: NodeBuilder, parameters: Norm, x: ir.Value, at: str, result: str | None = None) -> ir.Value:
    """RMSNorm or LayerNorm over the last axis; the operators compute statistics in float32.

    A weight [heads, width] of x [..., heads, width] is multiplied afterwards, since the operators take only
    [width].

    Args:
        at: prefix of the names of weight and bias.
        result: name of the result; None: `at`.
    """
    name = result or at
    op_type = "RMSNormalization" if parameters.kind == "rms" else "LayerNormalization"
    weight = None if parameters.weight is None else np.asarray(parameters.weight)
    if weight is not None and weight.ndim == 1:
        inputs = [nodes.weight(f"{at}.weight", weight)]
        if parameters.bias is not None:
            inputs.append(nodes.weight(f"{at}.bias", np.asarray(parameters.bias)))
        return nodes.op(op_type, x, *inputs, name=name, axis=-1, epsilon=parameters.eps)
    width = sizes(x)[-1]
    assert isinstance(width, int) and parameters.bias is None
    ones = nodes.constant(f"ones({width})", np.ones(width, NUMPY_DTYPES[nodes.dtype]))
    plain = name if weight is None else f"{at}.plain"
    normed = nodes.op(op_type, x, ones, name=plain, axis=-1, epsilon=parameters.eps)
    if weight is None:
        return normed
    return nodes.op("Mul", normed, nodes.weight(f"{at}.weight", weight), name=name)


def attention_products(
    nodes: Nodes,
    attention: Attention,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    mask: ir.Value,
    name: str,
) -> ir.Value:
    """Softmax(softcap(scale · Q Kᵀ), masked) V, [batch, H, sequence, value_dim]: ONNX's Attention."""
    shape, softcap = (*sizes(query)[:3], sizes(value)[3]), attention.softcap
    inputs, scale = (query, key, value, mask), attention.scale
    if softcap is None:
        return nodes.op("Attention", *inputs, name=name, shape=shape, scale=scale)
    return nodes.op("Attention", *inputs, name=name, shape=shape, scale=scale, softcap=softcap)


def block(
    nodes: NodeBuilder,
    index: int,
    layer: Layer,
    x: ir.Value,
    attend: Callable[[ir.Value, str], ir.Value],
) -> ir.Value:
    """Block `index`, whose equation is that of `Layer`: x and result are [batch, sequence, hidden].

    Args:
        attend: adds the attention of a normed input, and gives its output the name in its second argument.
    """
    name = f"layers.{index}"

    def normed(parameters: Norm | None, x: ir.Value, which: str) -> ir.Value:
        return x if parameters is None else norm(nodes, parameters, x, f"{name}.{which}")

    def added(
        which: str, result: str, output_norm: Norm | None, compute: Callable[[str], ir.Value]
    ) -> ir.Value:
        """What attention or MLP adds to the residual stream, named `result`."""
        scaled = layer.residual_multiplier != 1
        before_scale = f"{result}.unscaled" if scaled else result
        part = compute(before_scale if output_norm is None else f"{result}.output")
        if output_norm is not None:
            part = norm(nodes, output_norm, part, f"{name}.{which}_output_norm", before_scale)
        if not scaled:
            return part
        multiplier = nodes.number("residual_multiplier", layer.residual_multiplier)
        return nodes.op("Mul", part, multiplier, name=result)

    inner = normed(layer.attention_norm, x, "attention_norm")
    attended = added(
        "attention",
        attention_tap(index),
        layer.attention_output_norm,
        lambda result: attend(inner, result),
    )
    after = nodes.op("Add", x, attended, name=attention_residual(index))
    after = normed(layer.attention_residual_norm, after, "attention_residual_norm")
    if not layer.parallel:
        inner = normed(layer.mlp_norm, after, "mlp_norm")
    elif layer.mlp_norm is not None:
        inner = norm(nodes, layer.mlp_norm, x, f"{name}.mlp_norm")
    update = added(
        "mlp",
        f"{name}.mlp.down",
        layer.mlp_output_norm,
        lambda result: mlp(nodes, layer.mlp, inner, f"{name}.mlp", result),
    )
    if layer.mlp_residual_norm is None:
        return nodes.op("Add", after, update, name=residual_tap(index))
    total = nodes.op("Add", after, update, name=f"{name}.mlp_residual")
    return norm(nodes, layer.mlp_residual_norm, total, f"{name}.mlp_residual_norm", residual_tap(index))


def mlp(nodes: NodeBuilder, parameters: Mlp, x: ir.Value, name: str, result: str) -> ir.Value:
    """The MLP of a layer, gated or not: x [batch, sequence, hidden] to `result`, of the same shape."""
    if parameters.gate is None:
        inner = _activation(nodes, parameters, linear(nodes, parameters.up, x, f"{name}.up"), name)
    else:
        gate = _activation(nodes, parameters, linear(nodes, parameters.gate, x, f"{name}.gate"), name)
        inner = nodes.op("Mul", gate, linear(nodes, parameters.up, x, f"{name}.up"), name=f"{name}.gated")
    return linear(nodes, parameters.down, inner, f"{name}.down", result)


def _activation(nodes: NodeBuilder, parameters: Mlp, x: ir.Value, name: str) -> ir.Value:
    kind = parameters.activation
    if kind == "silu":  # not Swish, which TensorRT imports only from version 11 on
        return nodes.op("Mul", x, nodes.op("Sigmoid", x, name=f"{name}.sigmoid"), name=f"{name}.silu")
    if kind in ("relu", "relu_squared"):
        relu = nodes.op("Relu", x, name=f"{name}.relu")
        return relu if kind == "relu" else nodes.op("Mul", relu, relu, name=f"{name}.relu_squared")
    return nodes.op("Gelu", x, name=f"{name}.{kind}", approximate="tanh" if kind == "gelu_tanh" else "none")
