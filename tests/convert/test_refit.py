"""Refit of W_O: the closed form of ridge regression, without loss on held-out tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvexport.convert.refit import RIDGES, LeastSquares, _loss, refit
from kvexport.model.decoder import Linear


def sums(o: Linear, x: Tensor, y: Tensor) -> LeastSquares:
    least_squares = LeastSquares(o)
    least_squares.add(x, y)
    return least_squares


def loss(o: Linear, x: Tensor, y: Tensor) -> float:
    return float(torch.nn.functional.linear(x, o.weight, o.bias).sub(y).square().sum(-1).mean())


class Problem:
    """Tokens x, targets y = W x + b + noise, and a W_O that differs from W."""

    def __init__(
        self, seed: int, tokens: int = 60, into: int = 12, out: int = 5, noise: float = 0.3, off: float = 0.5
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.mixing, self.offset = self.random(into, into), 3 * self.random(into)
        self.weight, self.bias, self.noise = self.random(out, into), self.random(out), noise
        self.x, self.y = self.tokens(tokens)
        self.held_x, self.held_y = self.tokens(max(2, tokens // 8))
        self.o = Linear(self.weight + off * self.random(out, into), self.bias + off * self.random(out))

    def random(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator, dtype=torch.float64)

    def tokens(self, count: int) -> tuple[Tensor, Tensor]:
        x = self.random(count, len(self.mixing)) @ self.mixing + self.offset
        return x, x @ self.weight.T + self.bias + self.noise * self.random(count, len(self.bias))

    def refit(self) -> Linear:
        return refit(self.o, sums(self.o, self.x, self.y), sums(self.o, self.held_x, self.held_y))


def ridge_solution(problem: Problem, ridge: float) -> Linear:
    """argmin Σ|y - W x - b|² / N + λ|W - W_O|², by least squares on stacked equations, b unpenalised."""
    x, y, prior = problem.x, problem.y, problem.o.weight
    centred = (x - x.mean(0)) / len(x) ** 0.5
    scale = ridge * centred.square().sum() / x.shape[1]
    rows = torch.cat((centred, scale.sqrt() * torch.eye(x.shape[1], dtype=torch.float64)))
    target = torch.cat(((y - y.mean(0)) / len(x) ** 0.5, scale.sqrt() * prior.T))
    weight = torch.linalg.lstsq(rows, target).solution.T
    return Linear(weight, y.mean(0) - weight @ x.mean(0))


@pytest.mark.parametrize("seed", range(6))
def test_refit_is_the_best_of_the_closed_forms(seed: int) -> None:
    problem = Problem(seed)
    refitted = problem.refit()
    solutions = [ridge_solution(problem, ridge) for ridge in RIDGES]
    best = min(solutions, key=lambda o: loss(o, problem.held_x, problem.held_y))
    torch.testing.assert_close(refitted.weight, best.weight, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(refitted.bias, best.bias, rtol=1e-8, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(2, 40), st.sampled_from([0.0, 0.3, 30.0]), st.sampled_from([0.0, 0.5])
)
def test_refit_never_increases_the_held_out_loss(seed: int, tokens: int, noise: float, off: float) -> None:
    """With fewer tokens than inputs, noise as targets, or a W_O that is correct already."""
    problem = Problem(seed, tokens=tokens, noise=noise, off=off)
    before, after = (loss(o, problem.held_x, problem.held_y) for o in (problem.o, problem.refit()))
    assert after <= before * (1 + 1e-9) + 1e-9


def test_a_refit_that_would_lose_keeps_w_o_and_its_bias() -> None:
    problem = Problem(0, tokens=8, noise=0.0, off=0.0)
    problem.y = 100 * problem.random(
        *problem.y.shape
    )  # training targets are noise; on held-out tokens W_O is correct
    assert problem.refit() is problem.o


def test_fits_the_bias_alone_where_that_is_best() -> None:
    problem = Problem(0, tokens=2000, noise=0.0, off=0.0)
    shift = problem.random(5)
    problem.y, problem.held_y = problem.y + shift, problem.held_y + shift
    refitted = problem.refit()
    torch.testing.assert_close(refitted.bias, problem.bias + shift, rtol=0, atol=1e-8)
    torch.testing.assert_close(refitted.weight, problem.weight, rtol=0, atol=1e-8)


def test_w_o_without_bias_gets_one() -> None:
    problem = Problem(1)
    problem.o = Linear(problem.o.weight)
    assert problem.refit().bias is not None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_fixed_bias_stays_and_w_o_is_the_best_for_it(seed: int, has_bias: bool) -> None:
    problem = Problem(seed)
    given = problem.o.bias if has_bias else None
    problem.o = Linear(problem.o.weight, given)
    refitted = refit(
        problem.o,
        sums(problem.o, problem.x, problem.y),
        sums(problem.o, problem.held_x, problem.held_y),
        fit_bias=False,
    )
    assert refitted.bias is given
    target = problem.y if given is None else problem.y - given
    solutions = [Linear(problem.o.weight, given)]
    for ridge in RIDGES:
        x, y = problem.x / len(problem.x) ** 0.5, target / len(target) ** 0.5
        scale = ridge * x.square().sum() / x.shape[1]
        rows = torch.cat((x, scale.sqrt() * torch.eye(x.shape[1], dtype=torch.float64)))
        wanted = torch.cat((y, scale.sqrt() * problem.o.weight.T))
        solutions.append(Linear(torch.linalg.lstsq(rows, wanted).solution.T, given))
    best = min(solutions, key=lambda o: loss(o, problem.held_x, problem.held_y))
    torch.testing.assert_close(refitted.weight, best.weight, rtol=1e-8, atol=1e-10)


def test_w_o_is_recovered_from_exact_heads() -> None:
    problem = Problem(2, tokens=500, noise=0.0)
    refitted = problem.refit()
    assert loss(refitted, problem.held_x, problem.held_y) < 1e-4 * loss(
        problem.o, problem.held_x, problem.held_y
    )


def test_keeps_the_dtype() -> None:
    problem = Problem(3)
    problem.o = Linear(problem.o.weight.float(), problem.o.bias.float())
    problem.x, problem.y = problem.x.float(), problem.y.float()
    problem.held_x, problem.held_y = problem.held_x.float(), problem.held_y.float()
    refitted = problem.refit()
    assert refitted.weight.dtype == torch.float32
    assert refitted.bias is not None
    assert refitted.bias.dtype == torch.float32


def test_sums_do_not_depend_on_batches() -> None:
    problem = Problem(4)
    parts = LeastSquares(problem.o)
    for x, y in zip(problem.x.split(7), problem.y.split(7), strict=True):
        parts.add(x[None], y[None])
    for actual, expected in zip(
        parts.centred(), sums(problem.o, problem.x, problem.y).centred(), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_loss_is_the_squared_error_minus_a_constant() -> None:
    problem = Problem(5)
    moments = sums(problem.o, problem.x, problem.y)
    missed = problem.y - torch.nn.functional.linear(problem.x, problem.o.weight, problem.o.bias)
    variance = float(missed.var(0, correction=0).sum())
    for o in (problem.o, Linear(problem.weight, problem.bias)):
        measured = _loss(moments.centred(), o.weight - problem.o.weight, o.bias - problem.o.bias)
        assert measured + variance == pytest.approx(loss(o, problem.x, problem.y), rel=1e-9)


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_very_few_tokens_give_no_nan(tokens: int) -> None:
    problem = Problem(6)
    problem.x, problem.y = problem.x[:tokens], problem.y[:tokens]
    refitted = problem.refit()
    assert bool(refitted.weight.isfinite().all())
    assert bool(refitted.bias.isfinite().all())


def test_float32_sums_refit_as_float64_does() -> None:
    """The loss that is left differs by less than 1e-5 of what the refit gains."""
    problem = Problem(7, tokens=3000, into=48, out=24, noise=0.05)
    wide = problem.refit()
    narrow = Problem(7, tokens=3000, into=48, out=24, noise=0.05)
    narrow.o = Linear(problem.o.weight.float(), problem.o.bias.float())
    narrow.x, narrow.y, narrow.held_x, narrow.held_y = (
        each.float() for each in (problem.x, problem.y, problem.held_x, problem.held_y)
    )
    refitted = narrow.refit()
    before, after, other = (
        loss(Linear(o.weight.double(), o.bias.double()), problem.held_x, problem.held_y)
        for o in (problem.o, wide, refitted)
    )
    assert abs(other - after) < 1e-5 * (before - after)
