"""The clip search against brute force over the same scales."""

from __future__ import annotations

import numpy as np
import torch

from kvexport.quantize.clip import SHARES, clipped_scales, round_clipped
from kvexport.quantize.grid import Grid, dequantize, round_to_nearest


def heavy_tailed(out: int = 12, into: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(out, into, generator=generator, dtype=torch.float64) ** 3
    return weight, torch.rand(into, generator=generator, dtype=torch.float64)


def test_scales_equal_brute_force() -> None:
    weight, power = heavy_tailed()
    found = clipped_scales(weight, power, Grid(4, 32), torch.float64)
    for row in range(len(weight)):
        for block in range(2):
            at = slice(32 * block, 32 * block + 32)
            w, p = weight[row, at].numpy(), power[at].numpy()
            tried = [max(w.max() / 7, w.min() / -8) * share for share in SHARES]
            losses = [(p * (np.clip(np.rint(w / s), -8, 7) * s - w) ** 2).sum() for s in tried]
            assert np.isclose(float(found[row, block]), tried[int(np.argmin(losses))])


def test_weighted_error_is_less_than_without_clipping() -> None:
    weight, power = heavy_tailed()

    def error(codes) -> float:
        return float(((dequantize(codes) - weight).square() * power).sum())

    clipped = round_clipped(weight, power, Grid(4, 32), torch.float16)
    nearest = round_to_nearest(weight, 4, 32, torch.float16)
    assert error(clipped) < 0.9 * error(nearest)
    elsewhere = round_clipped(weight, power.flip(0), Grid(4, 32), torch.float16)
    assert error(clipped) < error(elsewhere)  # the weighting is used
    assert (clipped.scales > 0).all()
    assert (clipped.scales < nearest.scales).any()


def test_blocks_of_zeros_keep_scale_one() -> None:
    weight, power = heavy_tailed()
    weight[0, :32] = 0
    codes = round_clipped(weight, power, Grid(4, 32), torch.float32)
    assert codes.scales[0, 0] == 1
    assert (codes.codes[0, :32] == 0).all()
