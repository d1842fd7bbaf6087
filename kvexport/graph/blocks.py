"""Parts of a layer without a cache, as ONNX nodes: linear maps, norms, the MLP.

The reference is `kvexport.model.reference`. TensorRT's parser imports every operator used here.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kvexport.graph.nodes import NodeBuilder, sizes
from kvexport.model.decoder import Linear, Mlp, Norm


def linear(
    nodes: NodeBuilder, parameters: Linear, x: ir.Value, at: str, result: str | None = None
) -> ir.Value:
    """x [..., in] · weight [in, out] + bias.

    Args:
        at: prefix of the names of weight and bias.
        result: name of the result; None: `at`.
    """
    name, shape = result or at, (*sizes(x)[:-1], parameters.weight.shape[0])
    weight = nodes.weight(f"{at}.weight", np.asarray(parameters.weight).T)
    if parameters.bias is None:
        return nodes.op("MatMul", x, weight, name=name, shape=shape)
    product = nodes.op("MatMul", x, weight, name=f"{at}.product", shape=shape)
    return nodes.op("Add", product, nodes.weight(f"{at}.bias", np.asarray(parameters.bias)), name=name)


def norm(nodes: NodeBuilder, parameters: Norm, x: ir.Value, name: str) -> ir.Value:
    """RMSNorm or LayerNorm over the last axis; the operators compute statistics in float32."""
    inputs = [nodes.weight(f"{name}.weight", np.asarray(parameters.weight))]
    if parameters.bias is not None:
        inputs.append(nodes.weight(f"{name}.bias", np.asarray(parameters.bias)))
    op_type = "RMSNormalization" if parameters.kind == "rms" else "LayerNormalization"
    return nodes.op(op_type, x, *inputs, name=name, axis=-1, epsilon=parameters.eps)


def mlp(nodes: NodeBuilder, parameters: Mlp, x: ir.Value, name: str) -> ir.Value:
    """The MLP of a layer, gated or not: x [batch, sequence, hidden] to [batch, sequence, hidden]."""
    if parameters.gate is None:
        inner = _activation(nodes, parameters, linear(nodes, parameters.up, x, f"{name}.up"), name)
    else:
        gate = _activation(nodes, parameters, linear(nodes, parameters.gate, x, f"{name}.gate"), name)
        inner = nodes.op("Mul", gate, linear(nodes, parameters.up, x, f"{name}.up"), name=f"{name}.gated")
    return linear(nodes, parameters.down, inner, f"{name}.down")


def _activation(nodes: NodeBuilder, parameters: Mlp, x: ir.Value, name: str) -> ir.Value:
    kind = parameters.activation
    if kind == "silu":  # not Swish, which TensorRT imports only from version 11 on
        return nodes.op("Mul", x, nodes.op("Sigmoid", x, name=f"{name}.sigmoid"), name=f"{name}.silu")
    if kind == "relu":
        return nodes.op("Relu", x, name=f"{name}.relu")
    return nodes.op("Gelu", x, name=f"{name}.{kind}", approximate="tanh" if kind == "gelu_tanh" else "none")
