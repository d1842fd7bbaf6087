"""Second moments from float32 products agree with those in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvexport.calibrate import sums
from kvexport.calibrate.sums import SecondMomentSums

WIDTH = 24


def samples(count: int, offset: float, seed: int = 0) -> Tensor:
    """Correlated vectors [count, WIDTH] float64 whose mean is `offset` times their deviation."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) / WIDTH**0.5
    x = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64) @ mixing
    return x + offset


def added(x: Tensor, batch: int) -> SecondMomentSums:
    total = SecondMomentSums(WIDTH, device=x.device)
    for rows in x.split(batch):
        total.add(rows)
    return total


def error(found: Tensor, expected: Tensor) -> float:
    """Relative to the mean diagonal."""
    return float((found - expected).abs().max() / expected.diagonal().mean())


@pytest.mark.parametrize("offset", [0.0, 3.0, 1000.0])
def test_float32_products_agree_with_float64(offset: float) -> None:
    """To 2e-6 of the mean diagonal, also where the mean is a thousand times the deviation."""
    x = samples(20_000, offset).float()
    covariance = torch.cov(x.double().T, correction=0)
    total = added(x, 5000)
    assert error(total.covariance(), covariance) < 2e-6
    assert error(total.second(), x.double().T @ x.double() / len(x)) < 2e-6
    torch.testing.assert_close(total.mean(), x.double().mean(0), rtol=1e-6, atol=1e-6)
    assert total.second().dtype == total.covariance().dtype == torch.float64


def test_without_a_shift_the_covariance_would_be_lost() -> None:
    x = samples(20_000, 1000.0).float()
    naive = (x.T @ x).double() / len(x) - torch.outer(x.double().mean(0), x.double().mean(0))
    assert error(naive, torch.cov(x.double().T, correction=0)) > 1e-2


def test_sums_depend_neither_on_batches_nor_on_rows_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    x = samples(50, 2.0)
    whole = added(x, 50)
    monkeypatch.setattr(sums, "ROWS", 3)
    parts = added(x, 7)
    assert parts.count == whole.count == 50
    for name in ("mean", "second", "covariance"):
        torch.testing.assert_close(getattr(parts, name)(), getattr(whole, name)(), rtol=1e-12, atol=1e-12)


def test_stacks_are_independent() -> None:
    one, two = samples(30, 1.0), samples(30, -2.0, seed=1)
    total = SecondMomentSums(2, WIDTH, device=one.device)
    total.add(torch.stack((one, two)))
    for at, x in enumerate((one, two)):
        torch.testing.assert_close(total.second()[at], x.T @ x / 30, rtol=1e-12, atol=1e-12)


def test_no_samples_give_zeros() -> None:
    total = SecondMomentSums(WIDTH, device=torch.device("cpu"))
    assert float(total.second().abs().max()) == float(total.covariance().abs().max()) == 0.0
