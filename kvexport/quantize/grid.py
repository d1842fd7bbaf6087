"""Symmetric integer codes of weights: blocks, scales, round to nearest.

A weight [out, in] is divided, row by row, into blocks of adjacent columns. A block w has one scale s > 0 and
the codes c = clip(round(w / s), least, largest), which stand for c · s. There is no zero point: this is ONNX
DequantizeLinear in the form that every supported engine takes. Codes are in [-8, 7] in 4 bits, of which none
can be spared, and in [-127, 127] in 8 bits.

Scales are rounded to the data type that the graph computes in before codes are chosen, so that the codes fit
the scales that the engine sees.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kvexport.bundle.formats import BLOCKS, weight_format
from kvexport.errors import KvexportError
from kvexport.model.decoder import Linear, WeightCodes
from kvexport.model.lazy_table import LazyTable, is_large

Bits = Literal[4, 8]


@dataclass(frozen=True)
class Grid:
    """Bits and block of one weight.

    Attributes:
        bits: 4 or 8.
        block: adjacent columns that share a scale; None: the whole row.
    """

    bits: Bits
    block: int | None = None


def grid_for(weight: Tensor, bits: Bits, largest: int = BLOCKS[0]) -> Grid:
    """The grid of a weight [out, in] that is to be stored in `bits`, by the rule of `weight_format`: a weight
    that 4 bits cannot store gets 8.

    Args:
        weight: the weight, of which only the shape counts.
        bits: 4 or 8.
        largest: largest block in 4 bits.
    """
    rows, columns = weight.shape
    chosen = weight_format("int4" if bits == 4 else "int8", rows, columns, largest)
    return Grid(4 if chosen.format == "int4" else 8, chosen.block)


def code_range(bits: Bits) -> tuple[int, int]:
    """The least and the largest code."""
    return (-8, 7) if bits == 4 else (-127, 127)


def in_blocks(weight: Tensor, block: int | None) -> Tensor:
    """[out, in] as [out, blocks, block].

    Raises:
        ValueError: the block does not divide the columns.
    """
    width = weight.shape[1]
    block = width if block is None else block
    if block < 1 or width % block:
        raise ValueError(f"a block must divide the columns of the weight: got {block} and {width}")
    return weight.unflatten(1, (-1, block))


def absmax_scales(weight: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The smallest scales that clip no weight of any block, max(max(w) / largest, min(w) / least), [out,
    blocks], in the dtype of the weight, rounded to `dtype`.
    """
    blocks, (least, largest) = in_blocks(weight, grid.block), code_range(grid.bits)
    scales = torch.maximum(blocks.amax(2) / largest, blocks.amin(2) / least)
    return rounded_scales(scales, dtype)


def rounded_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales rounded to `dtype`, in their own dtype; 1 for a block of zeros, never 0 for any other."""
    least = least_scale(dtype)
    rounded = scales.clamp_min(least).to(dtype).to(scales.dtype)
    return torch.where(scales > 0, rounded, torch.ones_like(scales))


def least_scale(dtype: torch.dtype) -> float:
    """The smallest scale used in a data type: normal, or in float16, whose range is short, with 4 bits."""
    return 2.0**-20 if dtype == torch.float16 else torch.finfo(dtype).smallest_normal


def choose_codes(weight: Tensor, scales: Tensor, bits: Bits) -> Tensor:
    """Nearest codes of a weight [out, in] for scales [out, blocks], in the dtype of the weight."""
    blocks = weight.unflatten(1, (scales.shape[1], -1))
    return (blocks / scales[:, :, None]).round_().clamp_(*code_range(bits)).flatten(1)


def dequantize(codes: WeightCodes) -> Tensor:
    """The weight [out, in] that codes stand for, in the dtype of the scales."""
    blocks = codes.codes.unflatten(1, (codes.scales.shape[1], -1))
    return (blocks.to(codes.scales.dtype) * codes.scales[:, :, None]).flatten(1)


def dequantized_table(codes: WeightCodes) -> Tensor:
    """`dequantize` of a table, whose rows are made at each use if the table is large."""
    integers, scales = codes.codes, codes.scales
    shape = (integers.shape[0], integers.shape[1])
    if not is_large(shape, scales.dtype):
        return dequantize(codes)
    return LazyTable(
        lambda rows: dequantize(WeightCodes(integers[rows], scales[rows], codes.bits)), shape, scales.dtype
    )


def pack(codes: Tensor, scales: Tensor, bits: Bits, dtype: torch.dtype) -> WeightCodes:
    """`WeightCodes` of integers in any dtype [out, in] and scales [out, blocks].

    Raises:
        KvexportError: a weight would be infinite in `dtype`.
    """
    packed = WeightCodes(codes.to(torch.int8), scales, bits)
    if not bool(dequantize(packed).to(dtype).isfinite().all()):
        raise KvexportError(
            "a quantised weight must be finite in the data type of computation",
            got=f"a scale of {float(scales.max()):g} in {str(dtype).removeprefix('torch.')}",
            fix="use --dtype bfloat16 or --dtype float32",
        )
    return packed


def round_to_nearest(weight: Tensor, bits: Bits, block: int | None, dtype: torch.dtype) -> WeightCodes:
    """Codes of a weight with scales from the largest magnitude of each block.

    Args:
        weight: [out, in], finite.
        bits: 4 or 8.
        block: columns that share a scale; None: the whole row.
        dtype: data type of computation, to which scales are rounded.

    Returns:
        Codes, with scales in the dtype of `weight` whose values `dtype` represents.

    Raises:
        KvexportError: a weight is not finite, or would be infinite in `dtype`.
        ValueError: the block does not divide the columns.
    """
    require_finite(weight)
    scales = absmax_scales(weight, Grid(bits, block), dtype)
    return pack(choose_codes(weight, scales, bits), scales, bits, dtype)


def require_finite(weight: Tensor) -> None:
    """
    Raises:
        KvexportError: a weight is NaN or infinite.
    """
    if not bool(weight.isfinite().all()):
        count = int((~weight.isfinite()).sum())
        raise KvexportError(
            "weights must be finite to be quantised",
            got=f"{count} NaN or infinite numbers in a weight of {weight.shape[0]} x {weight.shape[1]}",
            fix="use a checkpoint whose weights are finite",
        )


def quantized(linear: Linear, codes: WeightCodes) -> Linear:
    """The linear map with a weight in codes; `weight` becomes exactly what they stand for, in its dtype."""
    return replace(linear, weight=dequantize(codes).to(linear.weight.dtype), codes=codes)
