"""Codes and scales of round to nearest: exactness, errors, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvexport.errors import KvexportError
from kvexport.model.decoder import Linear
from kvexport.quantize.grid import Grid, dequantize, grid_for, quantized, round_to_nearest

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def weights(out: int = 24, into: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, into, generator=torch.Generator().manual_seed(seed)) / 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "block"), [(4, 32), (4, 128), (8, None), (8, 64)])
def test_codes_equal_numpy(dtype: torch.dtype, bits: int, block: int | None) -> None:
    weight = weights()
    codes = round_to_nearest(weight, bits, block, dtype)
    least, largest = (-8, 7) if bits == 4 else (-127, 127)
    blocks = weight.numpy().reshape(24, -1, block or 256)
    exact = np.maximum(blocks.max(2) / np.float32(largest), blocks.min(2) / np.float32(least))
    scales = torch.from_numpy(exact).to(dtype).float().numpy()
    expected = np.clip(np.rint(blocks / scales[:, :, None]), least, largest).reshape(24, 256)
    assert codes.codes.dtype == torch.int8
    assert np.array_equal(codes.codes.numpy(), expected)
    assert np.array_equal(codes.scales.numpy(), scales)
    assert torch.equal(codes.scales.to(dtype).float(), codes.scales)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_half_a_step(dtype: torch.dtype) -> None:
    weight = weights()
    codes = round_to_nearest(weight, 4, 32, dtype)
    steps = codes.scales.repeat_interleave(32, 1)
    rounding = torch.finfo(dtype).eps * 8  # a scale rounded down clips the largest weight by that
    assert ((dequantize(codes) - weight).abs() <= steps * (0.5 + rounding)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_on_the_grid_are_exact(dtype: torch.dtype, bits: int) -> None:
    generator = torch.Generator().manual_seed(1)
    least, largest = (-8, 7) if bits == 4 else (-127, 127)
    integers = torch.randint(least, largest + 1, (8, 128), generator=generator).float()
    integers[:, ::32] = largest
    scales = 2.0 ** -torch.randint(3, 9, (8, 4), generator=generator)
    weight = integers * scales.repeat_interleave(32, 1)
    linear = quantized(Linear(weight), round_to_nearest(weight, bits, 32, dtype))
    assert torch.equal(linear.weight, weight)
    other = weight.clone()
    other[0, 1] += scales[0, 0] / 3  # off the grid: not exact
    assert not torch.equal(dequantize(round_to_nearest(other, bits, 32, dtype)), other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_are_positive_for_zeros_and_tiny_weights(dtype: torch.dtype) -> None:
    weight = torch.zeros(3, 64)
    weight[1] = 1e-30
    weight[2, 5] = -0.5
    codes = round_to_nearest(weight, 4, 32, dtype)
    assert (codes.scales.to(dtype) > 0).all()
    assert (codes.codes[0] == 0).all()
    assert codes.codes[2, 5] == -8
    assert dequantize(codes).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = weights()
    weight[3, 4] = bad
    with pytest.raises(KvexportError, match="weights must be finite"):
        round_to_nearest(weight, 4, 32, torch.float32)


def test_weights_beyond_float16_are_refused() -> None:
    weight = weights()
    weight[3, 4] = 1e6
    with pytest.raises(KvexportError, match="must be finite in the data type of computation"):
        round_to_nearest(weight, 4, 32, torch.float16)
    round_to_nearest(weight, 4, 32, torch.bfloat16)


@pytest.mark.parametrize(
    ("shape", "bits", "largest", "expected"),
    [
        ((2, 4096), 4, 128, Grid(4, 128)),
        ((2, 576), 4, 128, Grid(4, 64)),
        ((2, 96), 4, 128, Grid(4, 32)),
        ((2, 4096), 4, 32, Grid(4, 32)),
        ((2, 40), 4, 128, Grid(8)),
        ((3, 4096), 4, 128, Grid(8)),  # TensorRT takes an even number of rows
        ((2, 4096), 8, 128, Grid(8)),
    ],
)
def test_grid_of_a_weight(shape: tuple[int, int], bits: int, largest: int, expected: Grid) -> None:
    assert grid_for(torch.zeros(shape), bits, largest) == expected


def test_a_block_must_divide_the_columns() -> None:
    with pytest.raises(ValueError, match="must divide"):
        round_to_nearest(torch.zeros(2, 40), 4, 32, torch.float32)
