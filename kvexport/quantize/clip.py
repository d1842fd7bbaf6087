"""Clip search: the scale of each block that gives the least activation-weighted error of round to nearest.

A block w with scale s loses Σ_i E[x_i²] (w_i - q_i)². A scale below that of `absmax_scales` clips the largest
weights and rounds all others more finely. GPTQ must not use these scales: weights that carry the errors of
others saturate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvexport.model.decoder import WeightCodes
from kvexport.quantize.grid import (
    Grid,
    absmax_scales,
    choose_codes,
    in_blocks,
    pack,
    require_finite,
    rounded_scales,
)

SHARES = tuple(1 - 0.02 * step for step in range(26))  # of `absmax_scales`, 1 to 0.5


def clipped_scales(weight: Tensor, power: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Scales of least activation-weighted error among `SHARES` of `absmax_scales`.

    Args:
        weight: [out, in].
        power: E[x_i²] of each input, [in].
        grid: bits and block.
        dtype: data type of computation, to which scales are rounded.

    Returns:
        [out, blocks], in the dtype of `weight`.
    """
    most = absmax_scales(weight, grid, dtype)
    best, least = most, torch.full_like(most, torch.inf)
    power = power.to(weight)
    for share in SHARES:
        scales = rounded_scales(most * share, dtype)
        steps = scales.repeat_interleave(weight.shape[1] // scales.shape[1], 1)
        error = (choose_codes(weight, scales, grid.bits) * steps - weight).square_() * power
        loss = in_blocks(error, grid.block).sum(2)
        best = torch.where(loss < least, scales, best)
        least = torch.minimum(loss, least)
    return best


def round_clipped(weight: Tensor, power: Tensor, grid: Grid, dtype: torch.dtype) -> WeightCodes:
    """Codes of a weight by round to nearest with `clipped_scales`; arguments as there.

    Raises:
        KvexportError: a weight is not finite, or would be infinite in `dtype`.
    """
    require_finite(weight)
    scales = clipped_scales(weight, power, grid, dtype)
    return pack(choose_codes(weight, scales, grid.bits), scales, grid.bits, dtype)
