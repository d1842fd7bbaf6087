"""Which heads share: exact for pairs, never worse than adjacent ones, and what was planted is found."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvexport.convert.matching import Group, Loss, match_heads, order_of


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
    """Any number for any group, or one that grows with how far its heads are from each other on a line."""
    place = [random.Random(f"{seed} {head}").random() for head in range(32)]

    def loss(group: Group) -> float:
        if kind == "line":
            return sum(abs(place[a] - place[b]) for a, b in combinations(group, 2))
        return random.Random(f"{seed} {sorted(group)}").random()

    return loss


def total(groups: list[Group], loss: Loss) -> float:
    return sum(map(loss, groups))


def adjacent(heads: int, size: int) -> list[Group]:
    return [tuple(range(start, start + size)) for start in range(0, heads, size)]


def is_partition(groups: list[Group], heads: int, size: int) -> bool:
    return sorted(order_of(groups)) == list(range(heads)) and {len(group) for group in groups} == {size}


def test_partitions_are_counted_right() -> None:
    """Of the tests' own brute force: 5·3·1 matchings of six, 7·5·3·1 of eight, 10 splits of six into threes."""
    assert [sum(1 for _ in partitions(tuple(range(n)), size)) for n, size in ((6, 2), (8, 2), (6, 3))] == [
        15,
        105,
        10,
    ]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([4, 6, 8]), st.integers(0, 10**6), st.sampled_from(["uniform", "line"]))
def test_pairs_are_matched_exactly(heads: int, seed: int, kind: str) -> None:
    loss = random_loss(seed, kind)
    found = match_heads(heads, 2, loss)
    assert is_partition(found, heads, 2)
    assert total(found, loss) == pytest.approx(
        min(total(each, loss) for each in partitions(tuple(range(heads)), 2)), rel=1e-12
    )


def test_taking_the_best_pair_first_is_not_exact() -> None:
    """A control: losses for which greed ends worse, so that the test above can fail."""
    close = {(0, 1): 0.0, (2, 3): 9.0, (0, 2): 1.0, (1, 3): 1.0, (0, 3): 5.0, (1, 2): 5.0}
    found = match_heads(4, 2, close.__getitem__)
    assert found == [(0, 2), (1, 3)]
    assert close[0, 1] + close[2, 3] > total(found, close.__getitem__)


SIZES = [(8, 4), (12, 4), (16, 8), (6, 3), (9, 3), (12, 3), (12, 6), (10, 5)]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SIZES), st.integers(0, 10**6), st.sampled_from(["uniform", "line"]))
def test_larger_groups_are_a_partition_and_never_worse_than_adjacent_ones(
    drawn: tuple[int, int], seed: int, kind: str
) -> None:
    heads, size = drawn
    loss = random_loss(seed, kind)
    found = match_heads(heads, size, loss)
    assert is_partition(found, heads, size)
    assert total(found, loss) <= total(adjacent(heads, size), loss) + 1e-12


@pytest.mark.parametrize(("heads", "size"), [(6, 3), (8, 4), (9, 3)])
def test_larger_groups_come_close_to_the_best_there_is(heads: int, size: int) -> None:
    """Of all partitions of heads on a line; adjacent ones are further off."""
    found = best = plain = 0.0
    for seed in range(20):
        loss = random_loss(seed, "line")
        found += total(match_heads(heads, size, loss), loss)
        plain += total(adjacent(heads, size), loss)
        best += min(total(each, loss) for each in partitions(tuple(range(heads)), size))
    assert found < 1.02 * best
    assert plain > 1.2 * best


@pytest.mark.parametrize(("heads", "size"), [*SIZES, (32, 4), (24, 3), (32, 16)])
@pytest.mark.parametrize("seed", [0, 2, 3])
def test_planted_groups_are_found(heads: int, size: int, seed: int) -> None:
    """Heads of a group cost nothing together; others cost one a pair, with noise."""
    shuffled = random.Random(seed).sample(range(heads), heads)
    planted = sorted(tuple(sorted(shuffled[start : start + size])) for start in range(0, heads, size))
    assert planted != adjacent(heads, size)
    of = {head: which for which, group in enumerate(planted) for head in group}

    def loss(group: Group) -> float:
        apart = sum(of[a] != of[b] for a, b in combinations(group, 2))
        return apart + 0.1 * random.Random(f"{seed} {group}").random()

    assert match_heads(heads, size, loss) == planted


@pytest.mark.parametrize(("heads", "size"), [(8, 2), (12, 4), (12, 3)])
def test_the_same_losses_give_the_same_groups(heads: int, size: int) -> None:
    before = random.getstate()
    first, second = (match_heads(heads, size, random_loss(5)) for _ in range(2))
    assert first == second
    assert random.getstate() == before  # nor is the caller's generator touched
    assert first != match_heads(heads, size, random_loss(6))


@pytest.mark.parametrize("size", [1, 6])
def test_where_there_is_nothing_to_match_no_loss_is_asked(size: int) -> None:
    def loss(group: Group) -> float:
        raise AssertionError

    assert match_heads(6, size, loss) == adjacent(6, size)


def test_losses_are_asked_once_a_group_in_ascending_order() -> None:
    asked: list[Group] = []

    def loss(group: Group) -> float:
        asked.append(group)
        return random_loss(0)(group)

    match_heads(12, 4, loss)
    assert len(asked) == len(set(asked))
    assert all(list(group) == sorted(set(group)) for group in asked)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_losses_that_are_all_alike_are_no_trouble(size: int) -> None:
    assert is_partition(match_heads(12, size, lambda group: 0.0), 12, size)
