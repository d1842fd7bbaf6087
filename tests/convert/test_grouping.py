"""Which numbers of KV heads can be asked for, and which heads then share one."""

from __future__ import annotations

import pytest

from kvexport.convert import kv_heads_for
from kvexport.convert.groups import Grouping
from kvexport.errors import UsageError

COUNTS = [1, 2, 3, 5, 6, 8, 12, 16, 32, 40, 71]


def divisors(count: int) -> list[int]:
    return [each for each in range(1, count + 1) if count % each == 0]


@pytest.mark.parametrize("trained", COUNTS)
def test_every_divisor_is_accepted_as_a_number_and_as_a_ratio(trained: int) -> None:
    for count in divisors(trained):
        assert kv_heads_for(trained, count, None) == count
        assert kv_heads_for(trained, None, count / trained) == count
        assert kv_heads_for(trained, None, float(f"{count / trained:.4g}")) == count  # as errors list it


@pytest.mark.parametrize("trained", COUNTS)
def test_every_other_number_is_refused_and_told_the_divisors(trained: int) -> None:
    for count in {-1, 0, trained + 1, 2 * trained, *range(1, trained)} - set(divisors(trained)):
        with pytest.raises(UsageError, match="--kv-heads must divide") as refusal:
            kv_heads_for(trained, count, None)
        assert ", ".join(map(str, divisors(trained))) in str(refusal.value)


def test_half_is_the_default() -> None:
    assert kv_heads_for(12, None, None) == 6
    with pytest.raises(UsageError, match=r"no number of KV heads is 0\.5 of the model's 3") as refusal:
        kv_heads_for(3, None, None)
    assert "--kv-ratio 0.3333, 1" in str(refusal.value)


@pytest.mark.parametrize(
    "ratio", [0.4, 0.0, -0.5, 1.001, 1.5, 2.0, float("nan"), float("inf"), -float("inf")]
)
def test_a_ratio_that_cannot_be_met_lists_those_that_can(ratio: float) -> None:
    with pytest.raises(UsageError, match="no number of KV heads is") as refusal:
        kv_heads_for(12, None, ratio)
    assert f"{ratio:g} of the model's 12" in str(refusal.value)
    assert "--kv-ratio 0.08333, 0.1667, 0.25, 0.3333, 0.5, 1" in str(refusal.value)


def test_a_ratio_may_be_rounded_but_not_guessed() -> None:
    assert kv_heads_for(12, None, 0.333) == 4
    with pytest.raises(UsageError):
        kv_heads_for(12, None, 0.3)


def test_number_and_ratio_together_are_refused() -> None:
    for kv_heads, ratio in ((4, 0.5), (4, 0.25)):
        with pytest.raises(UsageError, match="say the same thing twice"):
            kv_heads_for(8, kv_heads, ratio)


@pytest.mark.parametrize(
    ("kv_heads", "size", "queries", "width"), [(2, 3, 1, 8), (4, 2, 4, 16), (1, 6, 2, 4), (8, 1, 1, 2)]
)
def test_groups_are_adjacent_and_cover_every_head_once(
    kv_heads: int, size: int, queries: int, width: int
) -> None:
    grouping = Grouping(kv_heads, size, queries, width)
    rows = [i for group in range(kv_heads) for i in range(1000)[grouping.rows(group)]]
    assert rows == list(range(kv_heads * size * width))
    heads = [head for group in range(kv_heads) for head in grouping.query_heads(group)]
    assert heads == list(range(kv_heads * size * queries))
    for group in range(kv_heads):
        for head in grouping.query_heads(group):
            trained = head // queries  # the KV head it attends to in the trained model
            own = range(1000)[grouping.rows(group)][grouping.member(head)]
            assert own == range(trained * width, (trained + 1) * width)
