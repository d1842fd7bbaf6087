"""The choice of 8-bit weights against an exhaustive search."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from kvexport.build.weight_analysis import _within_bits
from kvexport.errors import UsageError
from kvexport.quantize import mixed
from kvexport.quantize.mixed import MixedBitsFrontier
from kvexport.quantize.sensitivity import WeightLoss, names_by_layer


def random_losses(count: int = 10, unit: int = 48, seed: int = 0) -> dict[str, WeightLoss]:
    draw = random.Random(seed)
    losses = {}
    for index in range(count):
        size = unit * draw.randint(1, 12)
        kl = draw.random() ** 3
        losses[f"{index}.down"] = WeightLoss(size, kl, kl * draw.random() / 100, size, 2 * size)
    losses["0.o"] = WeightLoss(700, 0.02, 0.02, 700, 700)  # 8 bits already: no block divides it
    return losses


def every_choice(losses: dict[str, WeightLoss]) -> list[tuple[float, int]]:
    keys = list(losses)
    found = []
    for taken in itertools.product((False, True), repeat=len(keys)):
        kl = sum(losses[k].kl_eight if t else losses[k].kl for k, t in zip(keys, taken, strict=True))
        size = sum(losses[k].bytes_eight if t else losses[k].bytes for k, t in zip(keys, taken, strict=True))
        found.append((kl, size))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_choices_equal_an_exhaustive_search(seed: int) -> None:
    losses = random_losses(seed=seed)
    frontier, choices = MixedBitsFrontier(losses), every_choice(losses)
    for share in (0, 0.1, 0.35, 0.7, 1):
        most = round(frontier.fewest.bytes + share * (frontier.most.bytes - frontier.fewest.bytes))
        found = frontier.within_bytes(most)
        assert found.bytes <= most
        assert found.kl == pytest.approx(min(kl for kl, size in choices if size <= most))
    for kl in (frontier.fewest.kl, frontier.fewest.kl / 3, frontier.most.kl * 1.01):
        found = frontier.within_kl(kl)
        assert found.kl <= kl * (1 + 1e-9)
        assert found.bytes == min(size for each, size in choices if each <= kl * (1 + 1e-12))


def test_a_coarse_unit_stays_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = random_losses(unit=47)
    exact = MixedBitsFrontier(losses)
    monkeypatch.setattr(mixed, "_STEPS", 20)
    coarse = MixedBitsFrontier(losses)
    for most in range(exact.fewest.bytes, exact.most.bytes, 501):
        found = coarse.within_bytes(most)
        assert found.bytes <= most
        assert exact.within_bytes(most).kl <= found.kl


def test_limits_out_of_reach_are_refused() -> None:
    frontier = MixedBitsFrontier(random_losses())
    with pytest.raises(UsageError, match="must allow the smallest format"):
        frontier.within_bytes(frontier.fewest.bytes - 1)
    with pytest.raises(UsageError, match="must be reachable in 8 bits"):
        frontier.within_kl(frontier.most.kl / 2)
    assert frontier.within_bytes(10**12).kl == pytest.approx(frontier.most.kl)


def test_names_by_layer() -> None:
    assert names_by_layer({"0.q", "2.down", "head", "embedding"}, 3) == [["q"], [], ["down"]]


@pytest.mark.parametrize("bits", [("kl",), ("kl_eight",)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused(bits: tuple[str], value: float) -> None:
    losses = random_losses()
    losses["3.down"] = dataclasses.replace(losses["3.down"], **dict.fromkeys(bits, value))
    with pytest.raises(UsageError, match=r"predicted KL of the weight 3\.down in integers must be finite"):
        MixedBitsFrontier(losses)


@pytest.mark.parametrize("bits", [17.0, 1e308])
def test_more_bits_than_any_weight_has_give_8_bits_everywhere(bits: float) -> None:
    frontier = MixedBitsFrontier(random_losses())
    count = sum(each.weights for each in random_losses().values())
    chosen = _within_bits(frontier, bits, count)
    assert chosen.eight_bits == frontier.most.eight_bits - {"0.o"}
