"""Codes that commute with rotation: at every position, and each half-step the exact least squares that it says."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from decoders import make_attention, random_inputs
from layer_codes import loss, measure
from torch import Tensor

from kvexport import reference
from kvexport.calibrate.positions import Rotations
from kvexport.convert import keys
from kvexport.convert.codes import Code
from kvexport.convert.commuting import Mixes, _by_frequency, _matrix, _Problem, commuting_code
from kvexport.convert.groups import Grouping
from kvexport.decoder import Rope

HALF = 4  # pairs of a head
CHOICES = {
    "one each": [0, 1, 2, 3],
    "several": [0, 1, 1, 2, 3, 3, 3],
    "some": [1, 1, 3],
    "all": [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3],
}


class Case:
    """One group of all four heads of a random layer, and the least squares of its commuting code."""

    def __init__(self, style: str = "llama", seed: int = 0, frequencies: str = "several", averaged: bool = False) -> None:
        attention, rope = make_attention(style, heads=8 if style == "gqa" else 4, kv_heads=4, seed=seed, sharpness=2.0)
        assert rope is not None
        self.rope, self.frequencies = rope, torch.tensor(CHOICES[frequencies])
        self.moments = measure(attention, rope, random_inputs(4, 24, seed=seed), "fold")
        self.grouping = Grouping.of(attention, 1)
        self.weights = keys.member_weights(self.moments, self.grouping, 0)
        if averaged:
            self.weights = turned_long([*self.weights])
        self.second = self.moments.key_second.view(4, 2, HALF, 4, 2, HALF)
        self.problem = _Problem(self.weights.view(4, 2, HALF, 2, HALF), self.second, self.frequencies)
        self.start = _by_frequency(self.weights, self.second, self.frequencies)

    def loss(self, code: Code) -> float:
        return loss(code, torch.block_diag(*self.weights), self.moments.key_second)

    def code(self) -> Code:
        return commuting_code(self.moments, self.weights, self.grouping, 0, self.frequencies)


def turned_long(weights: list[Tensor]) -> Tensor:
    """S when every frequency has turned through all phases, so that errors of different ones do not meet."""
    apart = Rope(torch.tensor([0.1, 0.7, 1.3, 2.1]))
    return torch.stack([Rotations(apart, 200_000).second(each) for each in weights])


@pytest.mark.parametrize("style", ["llama", "gqa", "bias"])
@pytest.mark.parametrize("frequencies", CHOICES)
def test_the_code_of_rotated_keys_is_the_rotated_code_at_every_position(style: str, frequencies: str) -> None:
    case = Case(style, frequencies=frequencies)
    code = case.code()
    positions = torch.cat((torch.arange(64), torch.tensor([255, 4095, 131_071])))[None]
    tables = reference.rotary_tables(case.rope, positions, torch.float64)
    own = tuple(table[..., case.frequencies] for table in tables)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4, positions.shape[1], 2 * HALF, generator=generator, dtype=torch.float64)

    def encoded(heads: Tensor) -> Tensor:
        return heads.transpose(0, 1).flatten(1) @ code.encode

    def rebuilt(cached: Tensor) -> Tensor:
        return (cached @ code.decode.T).unflatten(-1, (4, -1)).transpose(0, 1)

    turned = reference.rotate(encoded(z)[None, None], (own[0], own[1]))[0, 0]
    torch.testing.assert_close(encoded(reference.rotate(z[None], tables)[0]), turned, rtol=0, atol=1e-11)
    torch.testing.assert_close(rebuilt(turned), reference.rotate(rebuilt(encoded(z))[None], tables)[0], rtol=0, atol=1e-11)
    if frequencies == "all":
        torch.testing.assert_close(rebuilt(encoded(z)), z, rtol=0, atol=1e-5)
    else:  # a control: pairs that turn otherwise than their heads
        wrong = tuple(table[..., case.frequencies.flip(0)] for table in tables)
        other = reference.rotate(encoded(z)[None, None], (wrong[0], wrong[1]))[0, 0]
        assert float((encoded(reference.rotate(z[None], tables)[0]) - other).abs().max()) > 0.1


@pytest.mark.parametrize("style", ["llama", "gqa", "bias"])
@pytest.mark.parametrize("frequencies", ["one each", "several", "some"])
@pytest.mark.parametrize("seed", range(2))
def test_no_half_step_raises_the_loss_and_six_rounds_settle(style: str, frequencies: str, seed: int) -> None:
    case = Case(style, seed, frequencies)
    mixes, losses = case.start, [case.loss(case.start.code(HALF))]
    for _ in range(12):
        mixes = Mixes(mixes.into, case.problem.best_out(mixes.into), case.frequencies)
        losses.append(case.loss(mixes.code(HALF)))
        mixes = Mixes(case.problem.best_into(mixes.out), mixes.out, case.frequencies)
        losses.append(case.loss(mixes.code(HALF)))
    assert all(after <= before * (1 + 1e-7) for before, after in pairwise(losses))
    made = case.loss(case.code())
    assert losses[13] * (1 - 1e-9) <= made <= losses[12] * (1 + 1e-9)
    assert made <= 1.05 * losses[-1]


@pytest.mark.parametrize("side", ["into", "out"])
@pytest.mark.parametrize("style", ["llama", "gqa", "bias"])
def test_each_half_step_is_where_the_gradient_vanishes(style: str, side: str) -> None:
    """By automatic differentiation of the loss itself."""
    case = Case(style)
    out = case.problem.best_out(case.start.into)
    fixed = {"into": case.start.into, "out": out}
    if side == "into":
        fixed["into"] = case.problem.best_into(out)
    sizes = []
    for start in (fixed[side], getattr(case.start, side)):
        mix = start.clone().requires_grad_()
        encode, decode = (
            _matrix(mix if name == side else fixed[name], case.frequencies, HALF).reshape(4 * 2 * HALF, -1)
            for name in ("into", "out")
        )
        residual = torch.eye(4 * 2 * HALF, dtype=torch.float64) - decode @ encode.T
        (torch.block_diag(*case.weights) * (residual @ case.moments.key_second @ residual.T)).sum().backward()
        assert mix.grad is not None
        sizes.append(float(mix.grad.norm()))
    assert sizes[0] < 1e-6 * sizes[1]  # the start, as a control, is no minimum


@pytest.mark.parametrize("style", ["llama", "gqa", "bias"])
def test_it_beats_a_code_for_each_frequency_where_they_interact(style: str) -> None:
    """Queries near their keys: phases have not averaged out."""
    case = Case(style, frequencies="one each")
    made, start = case.loss(case.code()), case.loss(case.start.code(HALF))
    assert made < 0.95 * start


@pytest.mark.parametrize("style", ["llama", "gqa", "bias"])
def test_and_finds_nothing_better_where_they_do_not(style: str) -> None:
    """The control: with queries of every phase the closed form is the optimum already."""
    case = Case(style, frequencies="one each", averaged=True)
    made, start = case.loss(case.code()), case.loss(case.start.code(HALF))
    assert 0.99 * start < made <= start


def test_heads_that_nobody_asks_do_not_stop_it() -> None:
    case = Case()
    some, none = case.weights.clone(), torch.zeros_like(case.weights)
    some[2] = 0
    for weights in (some, none):
        case.weights = weights
        code = case.code()
        assert bool(code.encode.isfinite().all()) and bool(code.decode.isfinite().all())
        assert case.loss(code) <= case.loss(case.start.code(HALF))
