"""Numbers of KV heads that can be requested, and the groups of heads that share one."""

from __future__ import annotations

import pytest

from kvexport.convert import kv_heads_for
from kvexport.convert.groups import Grouping
from kvexport.errors import UsageError

COUNTS = [1, 2, 3, 5, 6, 8, 12, 16, 32, 40, 71]


def divisors(count: int) -> list[int]:
    return [each for each in range(1, count + 1) if count % each == 0]


@pytest.mark.parametrize("trained", COUNTS)
def test_accepts_every_divisor_as_a_number_and_as_a_ratio(trained: int) -> None:
    for count in divisors(trained):
        assert kv_heads_for(trained, count, None) == count
        assert kv_heads_for(trained, None, count / trained) == count
        assert kv_heads_for(trained, None, float(f"{count / trained:.4g}")) == count  # as errors list it


@pytest.mark.parametrize("trained", COUNTS)
def test_rejects_other_numbers_and_lists_the_divisors(trained: int) -> None:
    for count in {-1, 0, trained + 1, 2 * trained, *range(1, trained)} - set(divisors(trained)):
        with pytest.raises(UsageError, match="--kv-heads must divide") as refusal:
            kv_heads_for(trained, count, None)
        assert ", ".join(map(str, divisors(trained))) in str(refusal.value)


def test_default_is_half_of_the_heads() -> None:
    assert kv_heads_for(12, None, None) == 6
    with pytest.raises(
        UsageError, match="must give a number of KV heads that divides the model's 3"
    ) as refusal:
        kv_heads_for(3, None, None)
    assert "--kv-ratio 0.5: 1.5 heads" in str(refusal.value)
    assert "--kv-ratio 0.3333, 1" in str(refusal.value)


@pytest.mark.parametrize(
    "ratio", [0.4, 0.0, -0.5, 1.001, 1.5, 2.0, float("nan"), float("inf"), -float("inf")]
)
def test_rejects_impossible_ratios_and_lists_possible_ones(ratio: float) -> None:
    with pytest.raises(UsageError, match="--kv-ratio must give a number of KV heads") as refusal:
        kv_heads_for(12, None, ratio)
    assert f"--kv-ratio {ratio:g}: " in str(refusal.value)
    assert "the model's 12" in str(refusal.value)
    assert "--kv-ratio 0.08333, 0.1667, 0.25, 0.3333, 0.5, 1" in str(refusal.value)


def test_accepts_rounded_ratios_only_near_a_possible_one() -> None:
    assert kv_heads_for(12, None, 0.333) == 4
    with pytest.raises(UsageError):
        kv_heads_for(12, None, 0.3)


def test_rejects_number_and_ratio_together() -> None:
    for kv_heads, ratio in ((4, 0.5), (4, 0.25)):
        with pytest.raises(UsageError, match="must not be given together"):
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
