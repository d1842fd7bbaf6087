"""Quantisation of one layer, part by part: each part sees the inputs that the quantised parts before it make.

    fold AWQ scales -> q, k, v -> o -> gate, up -> down

Where the trained model runs beside the quantised one, a part's weights W are first corrected for the
difference of its inputs x̂ from the trained ones x,

    W' = argmin E|W x - W' x̂|² + λ |W' - W|² = W + W E[(x - x̂) x̂ᵀ] (H + λ I)⁻¹,   H = E[x̂ x̂ᵀ],

and W' is what is quantised; a quantised model thus compensates in each layer what those before it lost. The
asymmetric calibration of GPTAQ (arXiv 2504.02692) has the same objective.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvexport.bundle.formats import BLOCKS
from kvexport.model.decoder import Layer, Linear, WeightCodes
from kvexport.quantize.awq import fold_channel_scales
from kvexport.quantize.clip import round_clipped
from kvexport.quantize.gptq import DAMPING, Factor
from kvexport.quantize.grid import Bits, Grid, grid_for, quantized, round_to_nearest
from kvexport.quantize.inputs import PARTS, InputMoments, LayerInputs, Part, linears_of, with_linears
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

    @property
    def carries_errors(self) -> bool:
        """Whether the method carries the errors of columns to those that follow (GPTQ)."""
        return "gptq" in self.method


def quantize_layer(
    layer: Layer,
    settings: WeightSettings,
    inputs: LayerInputs | None = None,
    *,
    eight_bits: Collection[str] = (),
) -> Layer:
    """Quantise the linear maps of a layer; its other parameters stay as they are.

    Args:
        layer: the layer, compressed or not; a linear map that has codes already is left as it is.
        settings: format and method.
        inputs: the residual streams before the layer; None: only with "nearest", without a correction.
        eight_bits: names of linear maps (q, k, v, o, gate, up, down) that get 8 bits.

    Raises:
        KvexportError: weights or moments are not finite, or a weight would be infinite in the data type.
    """
    if inputs is None:
        assert settings.method == "nearest"
        for part in PARTS:
            layer = with_linears(layer, part, _nearest(_without_codes(layer, part), settings, eight_bits))
        return layer
    if settings.method.startswith("awq") and not _has_codes(layer):  # folding changes every weight
        layer = fold_channel_scales(
            layer, inputs.second_moments, settings.bits, settings.block, settings.dtype
        )
    exact = layer
    for part in PARTS:
        linears = _without_codes(layer, part)
        if linears:
            moments = inputs.moments(layer, part, exact if settings.ridge is not None else None)
            layer = with_linears(layer, part, PartQuantizer(moments, settings)(linears, eight_bits))
    return layer


def _without_codes(layer: Layer, part: Part) -> dict[str, Linear]:
    """The linear maps of a part that are not quantised yet."""
    return {name: each for name, each in linears_of(layer, part).items() if each.codes is None}


def _has_codes(layer: Layer) -> bool:
    return any(len(_without_codes(layer, part)) < len(linears_of(layer, part)) for part in PARTS)


class PartQuantizer:
    """Quantises linear maps that share their inputs."""

    def __init__(self, moments: InputMoments, settings: WeightSettings) -> None:
        """
        Args:
            moments: of their inputs; with a drift, and a ridge in the settings, weights are corrected first.
            settings: format and method.
        """
        self._moments, self._settings = moments, settings
        self._factor: Factor | None = None

    def __call__(self, linears: dict[str, Linear], eight_bits: Collection[str] = ()) -> dict[str, Linear]:
        """The maps, by name, quantised.

        Args:
            linears: the maps, by name.
            eight_bits: names of those that get 8 bits.
        """
        settings = self._settings
        if self._moments.drift is not None and settings.ridge is not None:
            linears = _corrected(linears, self._moments, settings.ridge)
        if settings.method in ("nearest", "awq"):
            return _nearest(linears, settings, eight_bits)
        found: dict[str, Linear] = {}
        for grid, names in _by_grid(linears, settings, eight_bits).items():
            codes = self._codes(torch.cat([linears[name].weight for name in names]), grid)
            sizes = [len(linears[name].weight) for name in names]
            for name, rows in zip(names, _split(codes, sizes), strict=True):
                found[name] = quantized(linears[name], rows)
        return found

    def _codes(self, weight: Tensor, grid: Grid) -> WeightCodes:
        second, settings = self._moments.second, self._settings
        if settings.method == "clip":
            return round_clipped(weight, second.diagonal(), grid, settings.dtype)
        if self._factor is None:
            self._factor = Factor(second, settings.damping)
        return self._factor.codes(weight, grid, settings.dtype)


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
    for grid, names in _by_grid(linears, settings, eight_bits).items():
        for name in names:
            codes = round_to_nearest(linears[name].weight, grid.bits, grid.block, settings.dtype)
            found[name] = quantized(linears[name], codes)
    return found


def _by_grid(
    linears: dict[str, Linear], settings: WeightSettings, eight_bits: Collection[str]
) -> dict[Grid, list[str]]:
    """Names of maps by their grid; those of one grid are quantised together."""
    found: dict[Grid, list[str]] = {}
    for name, linear in linears.items():
        bits: Bits = 8 if name in eight_bits else settings.bits
        found.setdefault(grid_for(linear.weight, bits, settings.block), []).append(name)
    return found


def _split(codes: WeightCodes, sizes: list[int]) -> list[WeightCodes]:
    """Codes of weights that were stacked, with `sizes` rows each."""
    return [
        replace(codes, codes=integers.contiguous(), scales=scales.contiguous())
        for integers, scales in zip(codes.codes.split(sizes), codes.scales.split(sizes), strict=True)
    ]
