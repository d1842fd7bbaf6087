"""One layer measured, coded and applied, for tests of conversion's parts."""

from __future__ import annotations

import torch
from torch import Tensor

from kvexport.calibrate import Moments, MomentsAccumulator, windows
from kvexport.convert.apply import LayerCode, apply_code
from kvexport.convert.codes import Code
from kvexport.convert.groups import Grouping
from kvexport.convert.methods import METHODS, layer_code
from kvexport.decoder import Attention, Rope
from kvexport.reference import linear


def measure(attention: Attention, rope: Rope | None, x: Tensor) -> Moments:
    accumulator = MomentsAccumulator(attention)
    accumulator.add(x, rope)
    return accumulator.finish()


def grouping_of(attention: Attention, kv_heads: int) -> Grouping:
    size = attention.num_kv_heads // kv_heads
    return Grouping(kv_heads, size, attention.queries_per_kv_head, attention.head_dim)


def code_of(method: str, attention: Attention, rope: Rope | None, x: Tensor, kv_heads: int) -> tuple[Moments, LayerCode]:
    moments = measure(attention, rope, x)
    return moments, layer_code(METHODS[method], moments, attention, grouping_of(attention, kv_heads))


def converted_by(method: str, attention: Attention, rope: Rope | None, x: Tensor, kv_heads: int) -> Attention:
    """The layer after `method`, without refit, calibrated on `x` [B, S, hidden]."""
    moments, code = code_of(method, attention, rope, x, kv_heads)
    return apply_code(attention, grouping_of(attention, kv_heads), code, moments.value_mean)


def output(attention: Attention, rope: Rope | None, x: Tensor) -> Tensor:
    """The attention's output [B, S, hidden] on normed inputs."""
    return linear(attention.o, windows.head_outputs(attention, windows.project(attention, x, rope)))


def error(converted: Attention, attention: Attention, rope: Rope | None, x: Tensor) -> float:
    """Relative error of the output, about its mean, as `measured_error` defines it."""
    wanted = output(attention, rope, x)
    lost = (output(converted, rope, x) - wanted).square().sum()
    return float((lost / (wanted - wanted.mean((0, 1))).square().sum()).sqrt())


def identity_code(n: int) -> Code:
    """Nothing lost: all n numbers are kept."""
    return Code(torch.eye(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64))


def loss(code: Code, sensitivity: Tensor, covariance: Tensor) -> float:
    """tr(S · Cov(z - ẑ))."""
    residual = code.residual
    return float((sensitivity * (residual @ covariance @ residual.T)).sum())
