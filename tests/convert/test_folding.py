"""Codes of keys before RoPE: the loss equals plain sums, and each half-step minimises it exactly."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from support.decoders import make_attention, random_inputs
from support.layer_codes import code_moments
from torch import Tensor

from kvexport.calibrate import Rotations
from kvexport.convert import keys
from kvexport.convert.code_moments import make_code_moments
from kvexport.convert.codes import Code
from kvexport.convert.folding import ROUNDS, Folding, mix_covariances, mix_energies
from kvexport.convert.groups import Grouping
from kvexport.model.decoder import Rope

HALF = 4  # pairs per head
STYLES = ("llama", "gqa", "bias")
CHOICES = {
    "one each": [0, 1, 2, 3],
    "several": [0, 1, 1, 2, 3, 3, 3],
    "some": [1, 1, 3],
    "all": [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3],
}


class Case:
    """One group of all four heads of a random layer."""

    def __init__(
        self, style: str = "llama", seed: int = 0, frequencies: str = "several", distances: int = 24
    ) -> None:
        attention = make_attention(
            style, heads=8 if style == "gqa" else 4, kv_heads=4, seed=seed, sharpness=2.0
        )
        assert attention.rope is not None
        self.inv_freq, self.frequencies, self.count = (
            attention.rope.inv_freq.double(),
            torch.tensor(CHOICES[frequencies]),
            distances,
        )
        self.moments = code_moments(attention, random_inputs(4, 24, seed=seed), "fold").moments
        self.weights = keys.member_weights(self.moments, Grouping.of(attention, 1), 0)
        self.distances = Rotations.by_distance(attention.rope, distances)

    def problem(self, weights: Tensor | None = None) -> Folding:
        weights = self.weights if weights is None else weights
        return Folding(weights, self.moments.key_second, self.frequencies, self.distances)

    def rotation(self, frequencies: Tensor, n: int) -> Tensor:
        """R_{-n} for pairs with these frequencies, as a matrix."""
        angles = -n * self.inv_freq[frequencies]
        cos, sin = angles.cos().diag(), angles.sin().diag()
        return torch.cat((torch.cat((cos, -sin), 1), torch.cat((sin, cos), 1)))

    def loss(self, encode: Tensor, decode: Tensor) -> Tensor:
        """By plain sums over distances and heads, from encode [t·d, 2P] and decode [t·d, 2P]."""
        weights = 1 / (1 + torch.arange(self.count, dtype=torch.float64))
        total = torch.zeros((), dtype=torch.float64)
        for n, weight in enumerate(weights / weights.sum()):
            cached, own = self.rotation(self.frequencies, n), self.rotation(torch.arange(HALF), n)
            for head in range(4):
                rows = slice(8 * head, 8 * head + 8)
                exact = torch.zeros(8, 32, dtype=torch.float64)
                exact[:, rows] = own
                error = exact - decode[rows] @ cached @ encode.T
                total = (
                    total + weight * (self.weights[head] * (error @ self.moments.key_second @ error.T)).sum()
                )
        return total


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("frequencies", CHOICES)
def test_loss_equals_plain_sums(style: str, frequencies: str) -> None:
    case = Case(style, frequencies=frequencies)
    generator = torch.Generator().manual_seed(0)
    shape = (32, 2 * len(case.frequencies))
    code = Code(*(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)))
    assert case.problem().loss(code) == pytest.approx(float(case.loss(code.encode, code.decode)), rel=1e-9)
    nothing = Code(torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64))
    assert case.problem().power == pytest.approx(float(case.loss(nothing.encode, nothing.decode)), rel=1e-9)


@pytest.mark.parametrize("side", ["encode", "decode"])
@pytest.mark.parametrize("style", STYLES)
def test_gradient_vanishes_after_each_half_step(style: str, side: str) -> None:
    """Automatic differentiation of the plain sums."""
    case, problem = Case(style), Case(style).problem()
    start = problem.start()
    decode = problem.best_decoder(start)
    parts = (
        {"encode": start, "decode": decode.T}
        if side == "decode"
        else {"encode": problem.best_encoder(decode), "decode": decode.T}
    )
    sizes = []
    for free in (parts[side], start):
        part = free.clone().requires_grad_()
        case.loss(**(parts | {side: part})).backward()
        assert part.grad is not None
        sizes.append(float(part.grad.norm()))
    assert sizes[0] < 1e-3 * sizes[1]  # not 0: the ridge; control: the start is no minimum


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("frequencies", ["one each", "several", "some"])
@pytest.mark.parametrize("seed", range(2))
def test_half_steps_never_increase_the_loss_and_nearly_converge(
    style: str, frequencies: str, seed: int
) -> None:
    case, losses = Case(style, seed, frequencies), list[float]()
    problem = case.problem()
    encode = problem.start()
    for _ in range(60):
        decode = problem.best_decoder(encode)
        losses.append(problem.loss(Code(encode, decode.T)))
        encode = problem.best_encoder(decode)
        losses.append(problem.loss(Code(encode, decode.T)))
    assert all(after <= before * (1 + 1e-7) for before, after in pairwise(losses))
    loss = problem.loss(problem.code())
    assert loss <= 1.15 * losses[-1]
    assert loss < 0.95 * losses[0]


def alternate(problem: Folding, rounds: int) -> Tensor:
    """Loss after alternations without extrapolation."""
    encode = problem.start()
    for _ in range(rounds):
        encode = problem.best_encoder(problem.best_decoder(encode))
    return problem.loss(Code(encode, problem.best_decoder(encode).mT))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("frequencies", ["one each", "several", "some"])
def test_extrapolation_saves_half_of_the_alternations(style: str, frequencies: str) -> None:
    ratios = []
    for seed in range(4):
        problem = Case(style, seed, frequencies).problem()
        loss = problem.loss(problem.code(ROUNDS))
        assert loss < 1.03 * alternate(problem, 2 * ROUNDS)
        ratios.append(float(loss / alternate(problem, ROUNDS)))
    assert max(ratios) < 1.001
    assert min(ratios) < 0.998  # control: extrapolation makes a difference


@pytest.mark.parametrize("shared", [True, False])
def test_groups_are_solved_as_one_by_one(shared: bool) -> None:
    """Also with frequencies that differ between groups, and where a group has no query power."""
    cases = [Case("bias", seed, "several") for seed in range(3)]
    cases[2].weights = torch.zeros_like(cases[2].weights)
    if not shared:
        cases[1].frequencies = torch.tensor([0, 0, 1, 2, 2, 2, 3])
    together = Folding(
        torch.stack([case.weights for case in cases]),
        torch.stack([case.moments.key_second for case in cases]),
        cases[0].frequencies if shared else torch.stack([case.frequencies for case in cases]),
        cases[0].distances,
    )
    code = together.code(3)
    for at, case in enumerate(cases):
        alone = case.problem().code(3)
        torch.testing.assert_close(code.encode[at], alone.encode, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(code.decode[at], alone.decode, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(together.loss(code)[at], case.problem().loss(alone), rtol=1e-7, atol=1e-12)
        torch.testing.assert_close(together.power[at], case.problem().power, rtol=1e-12, atol=0)
    assert not torch.allclose(code.encode[0], code.encode[1])


def test_caching_all_pairs_loses_nothing() -> None:
    case = Case(frequencies="all")
    assert case.problem().loss(case.problem().code()) < 1e-8 * case.problem().power


@pytest.mark.parametrize("style", STYLES)
def test_start_is_optimal_for_uniform_phases(style: str) -> None:
    """Where all frequencies pass through all phases, codes that commute with RoPE are optimal, in closed
    form.
    """
    case = Case(style, frequencies="one each")
    uniform = Rotations(Rope(torch.tensor([0.1, 0.7, 1.3, 2.1])), 200_000)
    problem = Folding(case.weights, case.moments.key_second, case.frequencies, uniform)
    start = problem.start()
    loss, closed = problem.loss(problem.code()), problem.loss(Code(start, problem.best_decoder(start).T))
    assert 0.98 * closed < loss <= closed * (1 + 1e-9)
    assert closed == pytest.approx(
        float(mix_energies(mix_covariances(case.weights, case.moments.key_second))[:, 1:].sum()), rel=0.02
    )


@pytest.mark.parametrize("style", STYLES)
def test_code_for_short_distances_fails_at_long_ones(style: str) -> None:
    near, far = (
        Case(style, frequencies="one each", distances=2),
        Case(style, frequencies="one each", distances=4096),
    )
    for_near, for_all = near.problem().code(), far.problem().code()
    assert near.problem().loss(for_near) < 0.8 * near.problem().loss(for_all)
    assert far.problem().loss(for_all) < 0.8 * far.problem().loss(for_near)


def test_heads_without_query_power_give_finite_codes() -> None:
    case = Case()
    some, none = case.weights.clone(), torch.zeros_like(case.weights)
    some[2] = 0
    for weights in (some, none):
        problem = case.problem(weights)
        code = problem.code()
        assert bool(code.encode.isfinite().all()) and bool(code.decode.isfinite().all())
        assert problem.loss(code) <= problem.power


def test_distances_end_at_the_sliding_window() -> None:
    attention = make_attention("window")
    moments = code_moments(attention, random_inputs(4, 24), "fold").moments

    def code(positions: int, window: int | None) -> Code:
        each = make_code_moments(True, moments, replace(attention, window=window), positions)
        assert each.distances is not None
        return keys.folding(each.moments, Grouping.of(attention, 1), 0, None, each.distances).code()

    assert torch.equal(code(4096, 6).encode, code(6, None).encode)
    assert torch.equal(code(6, 4096).encode, code(6, None).encode)
    assert not torch.allclose(code(4096, None).encode, code(6, None).encode)
