"""Quantisation of one layer, part by part: each part sees the inputs that the quantised parts before it make.

    fold AWQ scales -> q, k, v -> refit W_O, if there is a refit -> o -> gate, up -> down

Where the trained model runs beside the quantised one, a part's weights W are first corrected for the
difference of its inputs x̂ from the trained ones x,

    W' = argmin E|W x - W' x̂|² + λ |W' - W|² = W + W E[(x - x̂) x̂ᵀ] (H + λ I)⁻¹,   H = E[x̂ x̂ᵀ],

and W' is what is quantised; a quantised model thus compensates in each layer what those before it lost. The
asymmetric calibration of GPTAQ (arXiv 2504.02692) has the same objective.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch

from kvexport.bundle.formats import BLOCKS
from kvexport.model.decoder import Layer, Linear, WeightCodes
from kvexport.quantize.awq import fold_channel_scales
from kvexport.quantize.clip import round_clipped
from kvexport.quantize.gptq import DAMPING, Factor
from kvexport.quantize.grid import Bits, grid_for, quantized, round_to_nearest
from kvexport.quantize.inputs import PARTS, InputMoments, LayerInputs, linears_of, with_linears
from kvexport.quantize.method_names import DEFAULT, Method

RIDGE = 1.0  # λ in units of the mean of H's diagonal


@dataclass(frozen=True)
class WeightSettings:
    """How the weights of a model's layers are quantised.

    Attributes:
        bits: bits of a weight, 4 or 8, unless it is listed as sensitive.
        block: largest block in 4 bits; in 8 bits a row has one scale.
        dtype: data type of computation, to which scales are rounded.
        method: how codes are chosen.
        damping: of the moments in GPTQ, in units of the mean of their diagonal.
        ridge: λ of the correction, in units of the mean of H's diagonal; None: weights are not corrected.
    """

    bits: Bits = 4
    block: int = BLOCKS[0]
    dtype: torch.dtype = torch.float32
    method: Method = DEFAULT
    damping: float = DAMPING
    ridge: float | None = RIDGE


def quantize_layer(
    layer: Layer,
    settings: WeightSettings,
    inputs: LayerInputs | None = None,
    *,
    eight_bits: Collection[str] = (),
    refit: Callable[[Layer], Linear] | None = None,
) -> Layer:
    """Quantise the linear maps of a layer; its other parameters stay as they are.

    Args:
        layer: the layer, compressed or not, with no part quantised.
        settings: format and method.
        inputs: the residual streams before the layer; None: only with "nearest", without a correction.
        eight_bits: names of linear maps (q, k, v, o, gate, up, down) that get 8 bits.
        refit: returns W_O refitted to the layer with quantised q, k and v; None: W_O is only corrected.

    Raises:
        KvexportError: weights or moments are not finite, or a weight would be infinite in the data type.
    """
    if inputs is None:
        assert settings.method == "nearest"
        for part in PARTS:
            layer = with_linears(layer, part, _nearest(linears_of(layer, part), settings, eight_bits))
        return layer
    if settings.method.startswith("awq"):
        layer = fold_channel_scales(
            layer, inputs.second_moments, settings.bits, settings.block, settings.dtype
        )
    exact = layer
    for part in PARTS:
        corrects = settings.ridge is not None
        if part == "o" and refit is not None:
            layer, corrects = with_linears(layer, "o", {"o": refit(layer)}), False
        moments = inputs.moments(layer, part, exact if corrects else None)
        layer = with_linears(
            layer, part, quantize_part(linears_of(layer, part), moments, settings, eight_bits)
        )
    return layer


def quantize_part(
    linears: dict[str, Linear],
    moments: InputMoments,
    settings: WeightSettings,
    eight_bits: Collection[str] = (),
) -> dict[str, Linear]:
    """Quantise linear maps that share their inputs.

    Args:
        linears: the maps, by name.
        moments: of their inputs; with a drift, and a ridge in the settings, weights are corrected first.
        settings: format and method.
        eight_bits: names of those that get 8 bits.
    """
    if moments.drift is not None and settings.ridge is not None:
        linears = _corrected(linears, moments, settings.ridge)
    if settings.method in ("nearest", "awq"):
        return _nearest(linears, settings, eight_bits)
    factor = None if settings.method == "clip" else Factor(moments.second, settings.damping)
    found: dict[str, Linear] = {}
    for names in _by_bits(linears, eight_bits):
        weight = torch.cat([linears[name].weight for name in names])
        grid = grid_for(weight.shape[1], _bits(names[0], settings, eight_bits), settings.block)
        if factor is None:
            codes = round_clipped(weight, moments.second.diagonal(), grid, settings.dtype)
        else:
            codes = factor.codes(weight, grid, settings.dtype)
        sizes = [len(linears[name].weight) for name in names]
        for name, rows in zip(names, _split(codes, sizes), strict=True):
            found[name] = quantized(linears[name], rows)
    return found


def _corrected(linears: dict[str, Linear], moments: InputMoments, ridge: float) -> dict[str, Linear]:
    """The maps with W + W E[(x - x̂) x̂ᵀ] (H + λ I)⁻¹ in place of W."""
    assert moments.drift is not None
    damped = moments.second.clone()
    mean = damped.diagonal().mean()
    if mean <= 0:
        return linears
    damped.diagonal().add_(ridge * mean)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return linears
    weight = torch.cat([linear.weight for linear in linears.values()]).to(factor.dtype)
    change = torch.cholesky_solve((weight @ moments.drift).T, factor).T  # [out of all, in]
    changes = change.split([len(linear.weight) for linear in linears.values()])
    return {
        name: replace(linear, weight=(linear.weight + each).to(linear.weight.dtype))
        for (name, linear), each in zip(linears.items(), changes, strict=True)
    }


def _nearest(
    linears: dict[str, Linear], settings: WeightSettings, eight_bits: Collection[str]
) -> dict[str, Linear]:
    found: dict[str, Linear] = {}
    for name, linear in linears.items():
        grid = grid_for(linear.weight.shape[1], _bits(name, settings, eight_bits), settings.block)
        found[name] = quantized(
            linear, round_to_nearest(linear.weight, grid.bits, grid.block, settings.dtype)
        )
    return found


def _bits(name: str, settings: WeightSettings, eight_bits: Collection[str]) -> Bits:
    return 8 if name in eight_bits else settings.bits


def _by_bits(linears: dict[str, Linear], eight_bits: Collection[str]) -> list[list[str]]:
    """Names of maps that have the same bits, which are quantised together."""
    groups = [
        [name for name in linears if name not in eight_bits],
        [name for name in linears if name in eight_bits],
    ]
    return [group for group in groups if group]


def _split(codes: WeightCodes, sizes: list[int]) -> list[WeightCodes]:
    """Codes of weights that were stacked, with `sizes` rows each."""
    return [
        replace(codes, codes=integers.contiguous(), scales=scales.contiguous())
        for integers, scales in zip(codes.codes.split(sizes), codes.scales.split(sizes), strict=True)
    ]
