"""Codes of keys before rotation: each half-step is the exact least squares that it says, of the loss that plain sums give."""

from __future__ import annotations

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
from kvexport.convert.folding import Folding, mix_energies
from kvexport.convert.groups import Grouping
from kvexport.model.decoder import Rope

HALF = 4  # pairs of a head
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
        attention, rope = make_attention(
            style, heads=8 if style == "gqa" else 4, kv_heads=4, seed=seed, sharpness=2.0
        )
        assert rope is not None
        self.inv_freq, self.frequencies, self.count = (
            rope.inv_freq.double(),
            torch.tensor(CHOICES[frequencies]),
            distances,
        )
        self.moments = code_moments(attention, rope, random_inputs(4, 24, seed=seed), "fold").moments
        self.weights = keys.member_weights(self.moments, Grouping.of(attention, 1), 0)
        self.distances = Rotations.by_distance(rope, distances)

    def problem(self, weights: Tensor | None = None) -> Folding:
        weights = self.weights if weights is None else weights
        return Folding(weights, self.moments.key_second, self.frequencies, self.distances)

    def turn(self, frequencies: Tensor, n: int) -> Tensor:
        """R_{-n} of pairs of these frequencies, as a matrix."""
        angles = -n * self.inv_freq[frequencies]
        cos, sin = angles.cos().diag(), angles.sin().diag()
        return torch.cat((torch.cat((cos, -sin), 1), torch.cat((sin, cos), 1)))

    def loss(self, encode: Tensor, decode: Tensor) -> Tensor:
        """By plain sums over distances and heads, from encode [t·d, 2P] and decode [t·d, 2P]."""
        weights = 1 / (1 + torch.arange(self.count, dtype=torch.float64))
        total = torch.zeros((), dtype=torch.float64)
        for n, weight in enumerate(weights / weights.sum()):
            cached, own = self.turn(self.frequencies, n), self.turn(torch.arange(HALF), n)
            for head in range(4):
                rows = slice(8 * head, 8 * head + 8)
                wanted = torch.zeros(8, 32, dtype=torch.float64)
                wanted[:, rows] = own
                error = wanted - decode[rows] @ cached @ encode.T
                total = (
                    total + weight * (self.weights[head] * (error @ self.moments.key_second @ error.T)).sum()
                )
        return total


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("frequencies", CHOICES)
def test_the_loss_is_that_of_plain_sums(style: str, frequencies: str) -> None:
    case = Case(style, frequencies=frequencies)
    generator = torch.Generator().manual_seed(0)
    shape = (32, 2 * len(case.frequencies))
    code = Code(*(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)))
    assert case.problem().loss(code) == pytest.approx(float(case.loss(code.encode, code.decode)), rel=1e-9)
    nothing = Code(torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64))
    assert case.problem().power == pytest.approx(float(case.loss(nothing.encode, nothing.decode)), rel=1e-9)


@pytest.mark.parametrize("side", ["encode", "decode"])
@pytest.mark.parametrize("style", STYLES)
def test_each_half_step_is_where_the_gradient_vanishes(style: str, side: str) -> None:
    """By automatic differentiation of the plain sums."""
    case, problem = Case(style), Case(style).problem()
    start = problem._start()
    decode = problem._decode(start)
    found = (
        {"encode": start, "decode": decode.T}
        if side == "decode"
        else {"encode": problem._encode(decode), "decode": decode.T}
    )
    sizes = []
    for free in (found[side], start):
        part = free.clone().requires_grad_()
        case.loss(**(found | {side: part})).backward()
        assert part.grad is not None
        sizes.append(float(part.grad.norm()))
    assert sizes[0] < 1e-3 * sizes[1]  # of the ridge; the start, as a control, is no minimum


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("frequencies", ["one each", "several", "some"])
@pytest.mark.parametrize("seed", range(2))
def test_no_half_step_raises_the_loss_and_the_rounds_made_come_near_the_end(
    style: str, frequencies: str, seed: int
) -> None:
    case, losses = Case(style, seed, frequencies), list[float]()
    problem = case.problem()
    encode = problem._start()
    for _ in range(60):
        decode = problem._decode(encode)
        losses.append(problem.loss(Code(encode, decode.T)))
        encode = problem._encode(decode)
        losses.append(problem.loss(Code(encode, decode.T)))
    assert all(after <= before * (1 + 1e-7) for before, after in pairwise(losses))
    made = problem.loss(problem.code())
    assert made <= 1.15 * losses[-1]
    assert made < 0.95 * losses[0]


def test_all_pairs_cached_lose_nothing() -> None:
    case = Case(frequencies="all")
    assert case.problem().loss(case.problem().code()) < 1e-9 * case.problem().power


@pytest.mark.parametrize("style", STYLES)
def test_where_phases_average_out_the_start_is_the_optimum_already(style: str) -> None:
    """The control of the gain: frequencies that all turn through all phases leave commuting codes, in closed form."""
    case = Case(style, frequencies="one each")
    apart = Rotations(Rope(torch.tensor([0.1, 0.7, 1.3, 2.1])), 200_000)
    problem = Folding(case.weights, case.moments.key_second, case.frequencies, apart)
    start = problem._start()
    made, closed = problem.loss(problem.code()), problem.loss(Code(start, problem._decode(start).T))
    assert 0.98 * closed < made <= closed * (1 + 1e-9)
    assert closed == pytest.approx(
        float(mix_energies(case.weights, case.moments.key_second)[:, 1:].sum()), rel=0.02
    )


@pytest.mark.parametrize("style", STYLES)
def test_a_code_made_for_near_distances_fails_far_and_one_for_all_holds(style: str) -> None:
    near, far = (
        Case(style, frequencies="one each", distances=2),
        Case(style, frequencies="one each", distances=4096),
    )
    for_near, for_all = near.problem().code(), far.problem().code()
    assert near.problem().loss(for_near) < 0.8 * near.problem().loss(for_all)
    assert far.problem().loss(for_all) < 0.8 * far.problem().loss(for_near)


def test_heads_that_nobody_asks_do_not_stop_it() -> None:
    case = Case()
    some, none = case.weights.clone(), torch.zeros_like(case.weights)
    some[2] = 0
    for weights in (some, none):
        problem = case.problem(weights)
        code = problem.code()
        assert bool(code.encode.isfinite().all()) and bool(code.decode.isfinite().all())
        assert problem.loss(code) <= problem.power


def test_keys_that_a_sliding_window_hides_are_not_coded_for() -> None:
    attention, rope = make_attention("window")
    moments = code_moments(attention, rope, random_inputs(4, 24), "fold").moments

    def code(positions: int, window: int | None) -> Code:
        seen = make_code_moments(True, moments, rope, positions, window)
        assert seen.distances is not None
        return keys.folding(seen.moments, Grouping.of(attention, 1), 0, None, seen.distances).code()

    assert torch.equal(code(4096, 6).encode, code(6, None).encode)
    assert torch.equal(code(6, 4096).encode, code(6, None).encode)
    assert not torch.allclose(code(4096, None).encode, code(6, None).encode)
