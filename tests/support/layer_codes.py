"""Moments, codes and conversion of one layer, for tests of the parts of conversion."""

from __future__ import annotations

import torch
from torch import Tensor

from kvexport.calibrate import Moments, MomentsAccumulator, windows
from kvexport.convert.apply import LayerCode, apply_code
from kvexport.convert.code_moments import CodeMoments, make_code_moments
from kvexport.convert.codes import Code
from kvexport.convert.groups import Grouping, KVShape
from kvexport.convert.methods import METHODS, layer_code
from kvexport.convert.predict import predict_error
from kvexport.model.decoder import Attention
from kvexport.model.reference import linear


def code_moments(attention: Attention, x: Tensor, method: str = "online") -> CodeMoments:
    """Moments that `method` codes, for the positions of `x` [B, S, hidden]."""
    chosen = METHODS[method]
    accumulator = MomentsAccumulator(attention, weighted=chosen.weighted)
    accumulator.add(x)
    return make_code_moments(chosen.before_rotation, accumulator.finish(), attention, x.shape[1])


def measure(attention: Attention, x: Tensor, method: str = "online") -> Moments:
    """The moments alone."""
    return code_moments(attention, x, method).moments


def predicted(attention: Attention, x: Tensor, method: str, kv_heads: int, code: LayerCode) -> float:
    """Predicted error of a code on the side of RoPE on which `method` codes keys."""
    return predict_error(
        code_moments(attention, x, method), attention, grouping_of(attention, kv_heads), code
    )


def grouping_of(attention: Attention, kv_heads: int) -> Grouping:
    return Grouping.of(attention, kv_heads)


def plain_shape(attention: Attention, kv_heads: int) -> KVShape:
    """`kv_heads` heads of the trained width."""
    return KVShape(kv_heads, attention.head_dim, attention.head_dim)


def code_of(
    method: str,
    attention: Attention,
    x: Tensor,
    kv_heads: int,
    shape: KVShape | None = None,
) -> tuple[Moments, LayerCode]:
    if attention.rope is None and method == "fold":
        method = "online"  # as `methods_for` does
    moments = code_moments(attention, x, method)
    shape = plain_shape(attention, kv_heads) if shape is None else shape
    code = layer_code(METHODS[method], moments, attention, grouping_of(attention, kv_heads), shape)
    return moments.moments, code


def converted_by(
    method: str,
    attention: Attention,
    x: Tensor,
    kv_heads: int,
    shape: KVShape | None = None,
) -> Attention:
    """The layer converted by `method` for adjacent heads, without refit, calibrated on `x` [B, S, hidden]."""
    moments, code = code_of(method, attention, x, kv_heads, shape)
    return apply_code(attention, grouping_of(attention, kv_heads), code, moments.value_mean)


def output(attention: Attention, x: Tensor) -> Tensor:
    """The attention's output [B, S, hidden] on normed inputs."""
    return linear(attention.o, windows.head_outputs(attention, windows.project(attention, x)))


def error(converted: Attention, attention: Attention, x: Tensor) -> float:
    """Relative error of the output about its mean, as `LayerReport.measured_error` defines it."""
    expected = output(attention, x)
    lost = (output(converted, x) - expected).square().sum()
    return float((lost / (expected - expected.mean((0, 1))).square().sum()).sqrt())


def identity_code(n: int) -> Code:
    """The code that keeps all n numbers."""
    return Code(torch.eye(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64))


def loss(code: Code, sensitivity: Tensor, covariance: Tensor) -> float:
    """tr(S · Cov(z - ẑ))."""
    residual = code.residual
    return float((sensitivity * (residual @ covariance @ residual.T)).sum())
