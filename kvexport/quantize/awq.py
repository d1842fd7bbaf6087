"""AWQ: scales of input channels, folded into what computes the inputs (arXiv 2306.00978).

W x = (W diag(s)) (x / s): a channel with large inputs gets a large s, so that its weights are rounded more
finely within their block. s = (E[x_i²])^(α/2), with the α in [0, 1] that gives the least output error
(section 3.2, eqs. 4 and 5; the root mean square in place of the mean magnitude, because H = E[x xᵀ] has it):

    tr((W - Q diag(s)⁻¹) H (W - Q diag(s)⁻¹)ᵀ),   Q = codes of W diag(s).

The division by s goes into the weights before, where that is exact:

    q, k, v       the norm of the attention
    gate, up      the norm of the MLP
    down          rows of up: act(gate x) · (up x) is linear in up; so is relu(up x) in positive factors
    o             rows of v, one s for all query heads that share a KV head; not with a clip or maps of values
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvexport.model.decoder import Layer, Linear, Norm
from kvexport.quantize.grid import Bits, absmax_scales, choose_codes, grid_for
from kvexport.quantize.inputs import Part

EXPONENTS = tuple(step / 20 for step in range(20))
_ROWS = 512  # rows of a weight on which exponents are compared
MomentsOf = Callable[[Layer, Part], Tensor]  # moments [in, in] of the inputs of a part of a layer


def channel_scales(
    weights: Sequence[Tensor],
    second: Tensor,
    bits: Bits,
    block: int,
    dtype: torch.dtype,
    tied: Tensor | None = None,
) -> Tensor:
    """Scales s of the input channels of weights that share their inputs.

    Args:
        weights: [out, in] each.
        second: H = E[x xᵀ], [in, in].
        bits: bits of the weights.
        block: largest block of a weight in 4 bits.
        dtype: data type of computation.
        tied: number of the scale that each channel takes, [in] int64, where channels share scales.

    Returns:
        [in] float64, positive; all 1 where no exponent reduces the error.
    """
    rows = [weight[:: max(1, len(weight) * len(weights) // _ROWS)] for weight in weights]
    weight = torch.cat(rows).double()
    second = second.double()
    grid = grid_for(weights[0], bits, block)
    power = second.diagonal()
    if tied is not None:
        sums = torch.zeros_like(power).index_add_(0, tied, power)
        power = (sums / tied.bincount(minlength=len(power)).clamp_min(1))[tied]
    power = power.clamp_min(float(power.max()) * 1e-8)
    best, least = torch.ones_like(power), torch.inf
    if not bool((power > 0).all()):
        return best
    for exponent in EXPONENTS:
        scales = power ** (exponent / 2)
        scales = scales / (scales.max() * scales.min()).sqrt()
        scaled = weight * scales
        steps = absmax_scales(scaled, grid, dtype)
        rounded = choose_codes(scaled, steps, grid.bits) * steps.repeat_interleave(
            weight.shape[1] // steps.shape[1], 1
        )
        error = rounded / scales - weight
        loss = float(((error @ second) * error).sum())
        if loss < least:
            best, least = scales, loss
    return best


def fold_channel_scales(
    layer: Layer, moments_of: MomentsOf, bits: Bits, block: int, dtype: torch.dtype
) -> Layer:
    """An equivalent layer whose weights lose less when they are quantised.

    Args:
        layer: the layer, not quantised.
        moments_of: returns second moments of the inputs of "qkv", "o", "gate_up" or "down" in a layer.
        bits: bits of the weights.
        block: largest block of a weight in 4 bits.
        dtype: data type of computation.
    """

    def scales_of(part: Part, *linears: Linear | None, tied: Tensor | None = None) -> Tensor:
        weights = [linear.weight for linear in linears if linear is not None]
        return channel_scales(weights, moments_of(layer, part), bits, block, dtype, tied)

    attention, mlp = layer.attention, layer.mlp
    if layer.attention_norm is not None and not (layer.parallel and layer.mlp_norm is None):
        scales = scales_of("qkv", attention.q, attention.k, attention.v)
        q, k, v = (_columns(each, scales) for each in (attention.q, attention.k, attention.v))
        attention = replace(attention, q=q, k=k, v=v)
        layer = replace(layer, attention_norm=_divided(layer.attention_norm, scales), attention=attention)
    if attention.clip is None and attention.value_encoder is None and attention.value_map is None:
        heads = torch.arange(attention.num_kv_heads).repeat_interleave(attention.queries_per_kv_head)
        value_rows = torch.arange(attention.v.weight.shape[0]).unflatten(0, (attention.num_kv_heads, -1))
        tied = value_rows[heads].flatten().to(attention.o.weight.device)  # row of v that a column of o reads
        scales = scales_of("o", attention.o, tied=tied)
        of_rows = scales.new_empty(len(attention.v.weight))
        of_rows[tied] = scales
        attention = replace(attention, v=_rows(attention.v, of_rows), o=_columns(attention.o, scales))
        layer = replace(layer, attention=attention)
    if layer.mlp_norm is not None:
        scales = scales_of("gate_up", mlp.gate, mlp.up)
        gate = None if mlp.gate is None else _columns(mlp.gate, scales)
        mlp = replace(mlp, gate=gate, up=_columns(mlp.up, scales))
        layer = replace(layer, mlp_norm=_divided(layer.mlp_norm, scales), mlp=mlp)
    if mlp.gate is not None or mlp.activation == "relu":
        scales = scales_of("down", mlp.down)
        layer = replace(layer, mlp=replace(mlp, up=_rows(mlp.up, scales), down=_columns(mlp.down, scales)))
    return layer


def _columns(linear: Linear, scales: Tensor) -> Linear:
    """W diag(s)."""
    return replace(linear, weight=(linear.weight.double() * scales).to(linear.weight.dtype))


def _rows(linear: Linear, scales: Tensor) -> Linear:
    """diag(s)⁻¹ W and s⁻¹ b."""
    weight = (linear.weight.double() / scales[:, None]).to(linear.weight.dtype)
    bias = None if linear.bias is None else (linear.bias.double() / scales).to(linear.bias.dtype)
    return Linear(weight, bias)


def _divided(norm: Norm, scales: Tensor) -> Norm:
    """The norm with its output divided by s."""
    weight = 1 / scales if norm.weight is None else norm.weight.double() / scales
    dtype = torch.float32 if norm.weight is None else norm.weight.dtype
    bias = None if norm.bias is None else (norm.bias.double() / scales).to(norm.bias.dtype)
    return replace(norm, weight=weight.to(dtype), bias=bias)
