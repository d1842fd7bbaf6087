"""Codes of a quantised checkpoint, kept where a bundle stores weights in the same form."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvexport.bundle.formats import BLOCKS, INTEGERS, WeightFormat, weight_format
from kvexport.model.decoder import Linear, WeightCodes
from kvexport.quantize.grid import dequantize, quantized

_ROUNDING = 2.0**-8  # largest relative error of a scale that is rounded to a dtype: that of bfloat16


def keep_codes(linear: Linear, name: str, block: int | None, dtype: torch.dtype) -> Linear:
    """A linear map with the codes that it has, if it is to be stored in their form; else without codes.

    Args:
        linear: the map; codes are those of the checkpoint.
        name: name of the format that it is to be stored in.
        block: the requested block of int4; None: any that engines take.
        dtype: data type of computation, to which scales are rounded.

    Returns:
        The map with codes; or without, and `inexact` says why they are not kept.
    """
    codes = linear.codes
    if name not in INTEGERS:
        return replace(linear, codes=None, inexact=None)
    if codes is None:
        return linear
    reason = _misfit(codes, name, block)
    if reason is None:
        rounded = codes.scales.to(dtype).to(codes.scales.dtype)
        kept = replace(codes, scales=rounded)
        fits = bool(((rounded / codes.scales - 1).abs() <= _ROUNDING).all())
        if fits and bool(dequantize(kept).to(dtype).isfinite().all()):
            return quantized(linear, kept)
        reason = f"scales that {str(dtype).removeprefix('torch.')} does not represent"
    return replace(linear, codes=None, inexact=reason)


def _misfit(codes: WeightCodes, name: str, block: int | None) -> str | None:
    """Why codes are not in the form that a weight is stored in as `name`; None: they are."""
    (rows, columns), blocks = codes.codes.shape, codes.scales.shape[1]
    stored = WeightFormat(f"int{codes.bits}", None if blocks == 1 and codes.bits == 8 else columns // blocks)
    wanted = weight_format(name, rows, columns, block or BLOCKS[0])
    if stored == wanted:
        return None
    if stored.format == wanted.format == "int4":
        if block is None and stored.block in BLOCKS:
            return None
        if block is None:
            return f"{stored}: blocks of a bundle are of {', '.join(map(str, reversed(BLOCKS)))}"
        return f"{stored}, where --weight-block {block} asks for {wanted}"
    return f"{stored}, to be stored as {wanted.format}" + (", by row" if wanted.format == "int8" else "")
