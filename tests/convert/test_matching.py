"""Matching of heads: exact for pairs, never worse than adjacent heads, and planted groups are recovered."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvexport.convert.matching import Group, match_heads, order_of

Loss = Callable[[Group], float]


def partitions(heads: tuple[int, ...], size: int) -> Iterator[list[Group]]:
    """Every way to split `heads` into groups of `size`."""
    if not heads:
        yield []
        return
    first, rest = heads[0], heads[1:]
    for others in combinations(rest, size - 1):
        left = tuple(head for head in rest if head not in others)
        yield from ([(first, *others), *more] for more in partitions(left, size))


def random_loss(seed: int, kind: str = "uniform") -> Loss:
    """A random number per group, or the sum of distances between its heads on a line."""
    place = [random.Random(f"{seed} {head}").random() for head in range(32)]

    def loss(group: Group) -> float:
        if kind == "line":
            return sum(abs(place[a] - place[b]) for a, b in combinations(group, 2))
        return random.Random(f"{seed} {sorted(group)}").random()

    return loss


def matched(heads: int, size: int, loss: Loss) -> list[Group]:
    return match_heads(heads, size, lambda groups: [loss(group) for group in groups])


def total(groups: list[Group], loss: Loss) -> float:
    return sum(map(loss, groups))


def adjacent(heads: int, size: int) -> list[Group]:
    return [tuple(range(start, start + size)) for start in range(0, heads, size)]


def is_partition(groups: list[Group], heads: int, size: int) -> bool:
    return sorted(order_of(groups)) == list(range(heads)) and {len(group) for group in groups} == {size}


def test_brute_force_counts_the_partitions() -> None:
    """Control: 5·3·1 matchings of six heads, 7·5·3·1 of eight, 10 splits of six into threes."""
    assert [sum(1 for _ in partitions(tuple(range(n)), size)) for n, size in ((6, 2), (8, 2), (6, 3))] == [
        15,
        105,
        10,
    ]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([4, 6, 8]), st.integers(0, 10**6), st.sampled_from(["uniform", "line"]))
def test_pairs_are_matched_exactly(heads: int, seed: int, kind: str) -> None:
    loss = random_loss(seed, kind)
    groups = matched(heads, 2, loss)
    assert is_partition(groups, heads, 2)
    assert total(groups, loss) == pytest.approx(
        min(total(each, loss) for each in partitions(tuple(range(heads)), 2)), rel=1e-12
    )


def test_greedy_pairs_are_not_optimal() -> None:
    """Control: losses for which greedy pairing ends worse, so that the test above can fail."""
    close = {(0, 1): 0.0, (2, 3): 9.0, (0, 2): 1.0, (1, 3): 1.0, (0, 3): 5.0, (1, 2): 5.0}
    groups = matched(4, 2, close.__getitem__)
    assert groups == [(0, 2), (1, 3)]
    assert close[0, 1] + close[2, 3] > total(groups, close.__getitem__)


SIZES = [(8, 4), (12, 4), (16, 8), (6, 3), (9, 3), (12, 3), (12, 6), (10, 5)]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SIZES), st.integers(0, 10**6), st.sampled_from(["uniform", "line"]))
def test_larger_groups_are_never_worse_than_adjacent_heads(
    drawn: tuple[int, int], seed: int, kind: str
) -> None:
    heads, size = drawn
    loss = random_loss(seed, kind)
    groups = matched(heads, size, loss)
    assert is_partition(groups, heads, size)
    assert total(groups, loss) <= total(adjacent(heads, size), loss) + 1e-12


@pytest.mark.parametrize(("heads", "size"), [(6, 3), (8, 4), (9, 3)])
def test_larger_groups_are_close_to_the_optimum(heads: int, size: int) -> None:
    """Heads on a line, compared with all partitions; adjacent heads are further off."""
    found = best = plain = 0.0
    for seed in range(20):
        loss = random_loss(seed, "line")
        found += total(matched(heads, size, loss), loss)
        plain += total(adjacent(heads, size), loss)
        best += min(total(each, loss) for each in partitions(tuple(range(heads)), size))
    assert found < 1.02 * best
    assert plain > 1.2 * best


@pytest.mark.parametrize(("heads", "size"), [*SIZES, (32, 4), (24, 3), (32, 16)])
@pytest.mark.parametrize("seed", [0, 2, 3])
def test_recovers_planted_groups(heads: int, size: int, seed: int) -> None:
    """Heads of one planted group have loss 0 together; other pairs have loss 1, with noise."""
    shuffled = random.Random(seed).sample(range(heads), heads)
    planted = sorted(tuple(sorted(shuffled[start : start + size])) for start in range(0, heads, size))
    assert planted != adjacent(heads, size)
    group_of = {head: which for which, group in enumerate(planted) for head in group}

    def loss(group: Group) -> float:
        apart = sum(group_of[a] != group_of[b] for a, b in combinations(group, 2))
        return apart + 0.1 * random.Random(f"{seed} {group}").random()

    assert matched(heads, size, loss) == planted


@pytest.mark.parametrize(("heads", "size"), [(8, 2), (12, 4), (12, 3)])
def test_is_deterministic(heads: int, size: int) -> None:
    before = random.getstate()
    first, second = (matched(heads, size, random_loss(5)) for _ in range(2))
    assert first == second
    assert random.getstate() == before  # the caller's generator is unchanged
    assert first != matched(heads, size, random_loss(6))


@pytest.mark.parametrize("size", [1, 6])
def test_needs_no_loss_where_there_is_no_choice(size: int) -> None:
    def loss(group: Group) -> float:
        raise AssertionError

    assert matched(6, size, loss) == adjacent(6, size)


def test_computes_each_loss_once_with_heads_in_ascending_order() -> None:
    groups: list[Group] = []

    def loss(group: Group) -> float:
        groups.append(group)
        return random_loss(0)(group)

    matched(12, 4, loss)
    assert len(groups) == len(set(groups))
    assert all(list(group) == sorted(set(group)) for group in groups)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_equal_losses_give_a_partition(size: int) -> None:
    assert is_partition(matched(12, size, lambda group: 0.0), 12, size)
