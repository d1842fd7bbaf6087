"""GPTQ against a direct implementation of the paper, column by column through the inverse of H."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kvexport.errors import KvexportError
from kvexport.quantize.gptq import gptq
from kvexport.quantize.grid import Grid, dequantize, round_to_nearest


def problem(out: int = 16, into: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(into, into // 4, generator=generator, dtype=torch.float64)
    x = torch.randn(512, into // 4, generator=generator, dtype=torch.float64) @ mixing.T
    x += 0.3 * torch.randn(512, into, generator=generator, dtype=torch.float64)
    weight = torch.randn(out, into, generator=generator, dtype=torch.float64)
    return weight, x.T @ x / len(x)


def loss(weight: Tensor, codes, second: Tensor) -> float:
    error = dequantize(codes) - weight
    return float(((error @ second) * error).sum())


def by_the_paper(weight: np.ndarray, second: np.ndarray, block: int, bits: int, damping: float) -> np.ndarray:
    """Codes by OBQ's updates: after each column, the error goes to all others through the inverse of H, and
    the inverse loses the column (arXiv 2210.17323, eqs. 2 and 3).
    """
    least, largest = (-8, 7) if bits == 4 else (-127, 127)
    blocks = weight.reshape(len(weight), -1, block)
    scales = np.maximum(blocks.max(2) / largest, blocks.min(2) / least).repeat(block, 1)
    h = second + damping * np.diag(second).mean() * np.eye(len(second))
    inverse, w = np.linalg.inv(h), weight.copy()
    codes = np.zeros_like(w)
    for i in np.argsort(-np.diag(second), kind="stable"):
        codes[:, i] = np.clip(np.rint(w[:, i] / scales[:, i]), least, largest)
        error = (w[:, i] - codes[:, i] * scales[:, i]) / inverse[i, i]
        w -= np.outer(error, inverse[i])
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i] = inverse[:, i] = 0  # the column is done
    return codes


@pytest.mark.parametrize(("bits", "block"), [(4, 32), (4, 64), (8, 64), (4, 16)])
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_codes_equal_the_paper(bits: int, block: int, damping: float) -> None:
    weight, second = problem()
    codes = gptq(weight, second, Grid(bits, block), torch.float64, damping=damping)
    expected = by_the_paper(weight.numpy(), second.numpy(), block, bits, damping)
    assert np.array_equal(codes.codes.numpy(), expected)
    assert not np.array_equal(codes.codes, round_to_nearest(weight, bits, block, torch.float64).codes)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("block", [32, 64])
def test_loss_is_less_than_that_of_round_to_nearest(seed: int, block: int) -> None:
    weight, second = problem(seed=seed)
    nearest = round_to_nearest(weight, 4, block, torch.float32)
    assert loss(weight, gptq(weight, second, Grid(4, block), torch.float32), second) < 0.7 * loss(
        weight, nearest, second
    )


def test_uncorrelated_inputs_give_round_to_nearest() -> None:
    weight, _ = problem()
    second = torch.rand(64, dtype=torch.float64).add_(0.1).diag()
    codes = gptq(weight, second, Grid(4, 32), torch.float32)
    assert torch.equal(codes.codes, round_to_nearest(weight, 4, 32, torch.float32).codes)


def test_weights_on_the_grid_are_exact() -> None:
    _, second = problem()
    integers = torch.randint(-7, 8, (16, 64), generator=torch.Generator().manual_seed(3)).float()
    integers[:, ::32] = 7
    codes = gptq(integers / 64, second, Grid(4, 32), torch.float16)
    assert torch.equal(dequantize(codes), integers / 64)


def test_columns_without_input_are_rounded_to_nearest() -> None:
    weight, second = problem()
    second[5], second[:, 5], second[40], second[:, 40] = 0, 0, 0, 0
    nearest = round_to_nearest(weight, 4, 32, torch.float32)
    codes = gptq(weight, second, Grid(4, 32), torch.float32, damping=0.0)
    assert torch.equal(codes.codes[:, [5, 40]], nearest.codes[:, [5, 40]])
    assert loss(weight, codes, second) < loss(weight, nearest, second)
    nothing = gptq(weight, torch.zeros_like(second), Grid(4, 32), torch.float32)
    assert torch.equal(nothing.codes, nearest.codes)


def test_moments_of_few_samples_are_damped_until_they_factorise() -> None:
    weight, _ = problem()
    x = torch.randn(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    codes = gptq(weight, x.T @ x, Grid(4, 32), torch.float32, damping=0.0)
    assert loss(weight, codes, x.T @ x) < loss(
        weight, round_to_nearest(weight, 4, 32, torch.float32), x.T @ x
    )


def test_moments_that_are_not_finite_are_refused() -> None:
    weight, second = problem()
    second[0, 0] = float("nan")
    with pytest.raises(KvexportError, match="second moments"):
        gptq(weight, second, Grid(4, 32), torch.float32)
