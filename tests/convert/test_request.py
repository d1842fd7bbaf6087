"""Shapes that the options mean, and errors for options that contradict each other."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from support.decoders import make_attention

from kvexport.convert import CompressionRequest, KVShape, fixed_shape, methods_for, uniform_shape
from kvexport.convert.budget import Widths
from kvexport.convert.request import group_sizes
from kvexport.errors import UsageError

ATTENTION = make_attention("llama", heads=8)  # eight KV heads of 8
OPTIONS = {"kv_heads": 2, "kv_ratio": 0.5, "max_kl": 0.1, "group_size": 4, "kv_head_dim": 16}
CONTRADICTIONS = [
    {"kv_heads", "kv_ratio"}, {"kv_heads", "max_kl"}, {"kv_ratio", "max_kl"}, {"kv_heads", "group_size"},
    {"group_size", "kv_head_dim", "kv_ratio"}, {"group_size", "kv_head_dim", "max_kl"},
]  # fmt: skip
EVERY_SET = [frozenset(names) for count in range(6) for names in combinations(OPTIONS, count)]
ALLOWED = [names for names in EVERY_SET if not any(pair <= names for pair in CONTRADICTIONS)]


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def shape_of(method: str = "online", **options: Any) -> KVShape | None:
    return fixed_shape(CompressionRequest(**options), methods_for(method, ATTENTION), ATTENTION)


def refusal(method: str = "online", **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        shape_of(method, **options)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("method", ["auto", "online", "fold", "svd-a", "mean-pool"])
@pytest.mark.parametrize("names", CONTRADICTIONS, ids=lambda names: "+".join(sorted(names)))
def test_rejects_contradictions_and_names_the_options(names: set[str], method: str) -> None:
    message = refusal(method, **{name: OPTIONS[name] for name in names})
    assert all(option(name) in message for name in names)
    assert "must not be given together" in message and "leave one of them out" in message


@pytest.mark.parametrize("names", EVERY_SET, ids=lambda names: "+".join(sorted(names)) or "nothing")
def test_accepts_every_set_of_options_without_a_contradiction(names: frozenset[str]) -> None:
    options = {name: OPTIONS[name] for name in names}
    if names in ALLOWED:
        shape_of(**options)
    else:
        assert "must not be given together" in refusal(**options)


def test_option_sets_of_both_kinds_exist() -> None:
    assert len(EVERY_SET) == 32 and len(ALLOWED) == 12


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kv_heads": 4}, KVShape(4, 8, 8)),
        ({"kv_heads": 1}, KVShape(1, 8, 8)),
        ({"kv_heads": 8}, KVShape(8, 8, 8)),
        ({"kv_heads": 2, "kv_head_dim": 16}, KVShape(2, 16, 16)),
        ({"kv_heads": 1, "kv_head_dim": 64}, KVShape(1, 64, 64)),
        ({"kv_heads": 8, "kv_head_dim": 4}, KVShape(8, 4, 4)),
        ({"group_size": 4, "kv_head_dim": 16}, KVShape(2, 16, 16)),
        ({"group_size": 8, "kv_head_dim": 32}, KVShape(1, 32, 32)),
        ({"group_size": 1, "kv_head_dim": 6}, KVShape(8, 6, 6)),
        ({"kv_ratio": 1}, KVShape(8, 8, 8)),
        ({}, None),
        ({"kv_ratio": 0.3}, None),
        ({"max_kl": 0.1}, None),
        ({"group_size": 4}, None),
        ({"kv_head_dim": 16}, None),
        ({"kv_head_dim": 16, "kv_ratio": 0.3}, None),
        ({"group_size": 4, "max_kl": 0.1}, None),
    ],
)
@pytest.mark.parametrize("method", ["auto", "online", "fold"])
def test_shape_of_each_set_of_options(method: str, options: dict[str, Any], expected: KVShape | None) -> None:
    assert shape_of(method, **options) == expected


@pytest.mark.parametrize("method", ["svd-a", "svd-w", "mean-pool"])
def test_baselines_keep_the_trained_head_width(method: str) -> None:
    assert shape_of(method) == KVShape(4, 8, 8)
    assert shape_of(method, kv_ratio=0.25) == KVShape(2, 8, 8)
    assert shape_of(method, kv_heads=1) == KVShape(1, 8, 8)
    assert shape_of(method, kv_ratio=1) == KVShape(8, 8, 8)
    assert shape_of(method, kv_heads=2, kv_head_dim=8) == KVShape(2, 8, 8)
    assert "0.125, 0.25, 0.5, 1" in refusal(method, kv_ratio=0.4)
    for options in ({"max_kl": 0.1}, {"group_size": 4}, {"group_size": 4, "kv_head_dim": 16}):
        message = refusal(method, **options)
        assert f"--method {method}" in message and "auto, online, fold" in message
    assert "--kv-head-dim 16" in refusal(method, kv_head_dim=16)  # without a number of heads


def test_svd_a_accepts_a_width_with_a_number_of_heads() -> None:
    assert shape_of("svd-a", kv_heads=2, kv_head_dim=16) == KVShape(2, 16, 16)
    assert "needs heads of the trained width" in refusal("mean-pool", kv_heads=2, kv_head_dim=16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_heads": 3}, ("--kv-heads must divide", "1, 2, 4, 8")),
        ({"group_size": 3}, ("--group-size must divide", "1, 2, 4, 8")),
        ({"group_size": 0}, ("--group-size must divide", "1, 2, 4, 8")),
        ({"group_size": 16}, ("--group-size must divide", "1, 2, 4, 8")),
        ({"kv_ratio": 0}, ("--kv-ratio must be a fraction of the KV cache", "above 0, at most 1")),
        ({"kv_ratio": 1.5}, ("--kv-ratio must be a fraction of the KV cache", "above 0, at most 1")),
        ({"kv_ratio": float("nan")}, ("--kv-ratio must be a fraction of the KV cache", "above 0, at most 1")),
        ({"max_kl": 0}, ("--max-kl must be a positive number", "above 0")),
        ({"max_kl": float("inf")}, ("--max-kl must be a positive number", "above 0")),
        ({"max_kl": float("nan")}, ("--max-kl must be a positive number", "above 0")),
        ({"kv_head_dim": 0}, ("--kv-head-dim must be a width that fused attention supports", "1 to 256")),
        ({"kv_head_dim": 257}, ("--kv-head-dim must be a width that fused attention supports", "1 to 256")),
        (
            {"kv_heads": 4, "kv_head_dim": 17},
            (
                "--kv-head-dim must not exceed the total width of the heads that share a cached head",
                "1 to 16 for 2 heads of 8",
            ),
        ),
        (
            {"group_size": 2, "kv_head_dim": 32},
            (
                "--kv-head-dim must not exceed the total width of the heads that share a cached head",
                "1 to 16 for 2 heads of 8",
            ),
        ),
    ],
)
def test_rejects_values_out_of_range_and_lists_the_range(
    options: dict[str, Any], words: tuple[str, ...]
) -> None:
    message = refusal(**options)
    assert all(word in message for word in words)


def test_odd_widths_need_codes_after_rotation() -> None:
    assert shape_of("online", kv_heads=2, kv_head_dim=15) == KVShape(2, 15, 15)
    for method in ("fold", "auto"):
        assert "even" in refusal(method, kv_heads=2, kv_head_dim=15)
    without = make_attention("bloom")
    assert fixed_shape(
        CompressionRequest(kv_heads=2, kv_head_dim=15), methods_for("fold", without), without
    ) == KVShape(2, 15, 15)


def test_default_ratio_is_one_half() -> None:
    assert CompressionRequest().ratio == 0.5
    assert CompressionRequest(kv_ratio=0.25).ratio == 0.25


def test_widths_follow_the_request() -> None:
    assert CompressionRequest().widths == Widths(equal=True, only=None)
    assert CompressionRequest(kv_head_dim=64, equal_widths=False).widths == Widths(equal=False, only=64)


def test_group_sizes_are_divisors_within_the_largest_eigenvalue_problem() -> None:
    assert group_sizes(CompressionRequest(), ATTENTION) == [1, 2, 4, 8]
    assert group_sizes(CompressionRequest(group_size=4), ATTENTION) == [4]
    wide = make_attention("llama", heads=8, head_dim=512, hidden=8)
    assert group_sizes(CompressionRequest(), wide) == [1, 2, 4]  # 8 · 512 numbers are more than 2048
    six = make_attention("llama", heads=6)
    assert group_sizes(CompressionRequest(), six) == [1, 2, 3, 6]


def test_hugging_face_checkpoint_has_one_shape() -> None:
    def uniform(method: str = "fold", **options: Any) -> KVShape:
        return uniform_shape(CompressionRequest(**options), methods_for(method, ATTENTION), ATTENTION)

    assert uniform() == uniform(kv_ratio=0.5) == uniform(kv_heads=4) == KVShape(4, 8, 8)
    assert uniform("mean-pool", kv_ratio=0.25) == KVShape(2, 8, 8)
    assert uniform(kv_ratio=1) == KVShape(8, 8, 8)
    for options in ({"kv_ratio": 0.4}, {"kv_heads": 3}, {"kv_heads": 2, "kv_ratio": 0.25}):
        with pytest.raises(UsageError):
            uniform(**options)
    for name in ("max_kl", "group_size", "kv_head_dim"):
        with pytest.raises(UsageError, match=option(name)):
            uniform(**{name: OPTIONS[name]})


@pytest.mark.parametrize("name", ["group_size", "kv_head_dim"])
def test_rejects_shapes_with_the_whole_cache(name: str) -> None:
    options = {name: OPTIONS[name]}
    assert option(name) in refusal(kv_ratio=1.0, **options)
