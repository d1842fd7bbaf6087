"""`kvexport.plan.memory`: bytes computed by hand for a small model, and the longest context that fits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.anchors import CONFIGS

from kvexport.engine.options import DEFAULT_CHUNK
from kvexport.plan.memory import kv_bytes_per_token, largest_context, memory, precision, weight_bytes
from kvexport.plan.sizes import Cache, Sizes, trained_sizes

SMALL = Sizes(
    num_heads=4,
    hidden=32,
    vocab=100,
    max_positions=None,
    matrices=12_800,
    rows=400,
    small=70,
    embedding=3200,
    head=0,
    mlp_width=96,
    caches=(Cache(2, 16), Cache(2, 16)),
)


@pytest.fixture
def llama(tmp_path: Path) -> Sizes:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["Llama-2-7B"]))
    return trained_sizes(tmp_path).with_kv_heads(32)


def test_weight_bytes_equal_a_computation_by_hand() -> None:
    rest = 70 + 3200
    assert weight_bytes(SMALL, precision("float32", "tensorrt")) == 4 * (12_800 + rest)
    assert weight_bytes(SMALL, precision("float16", "tensorrt")) == 2 * (12_800 + rest)
    assert weight_bytes(SMALL, precision("bfloat16", "tensorrt")) == 2 * (12_800 + rest)
    assert weight_bytes(SMALL, precision("int8", "tensorrt")) == 12_800 + 2 * 400 + 2 * rest
    assert weight_bytes(SMALL, precision("int4", "tensorrt")) == 6_400 + 2 * 100 + 2 * rest
    assert weight_bytes(SMALL, precision("int4", "onnxruntime")) == 6_400 + 4 * 100 + 4 * rest
    assert weight_bytes(replace(SMALL, head=3200), precision("float16", "tensorrt")) == 2 * (
        12_800 + rest + 3200
    )


def test_llama_2_7b_caches_half_a_mebibyte_a_token(llama: Sizes) -> None:
    assert kv_bytes_per_token(llama, precision("float16", "tensorrt")) == 2**19
    assert (
        memory(llama, precision("float16", "tensorrt"), 2048, engine="tensorrt", lowering="std24").kv == 2**30
    )


def test_scores_take_memory_without_fused_attention(llama: Sizes) -> None:
    half = precision("float16", "tensorrt")
    fused, apart = (
        memory(llama, half, 4096, engine="tensorrt", lowering=name) for name in ("std24", "decomposed17")
    )
    assert apart.activations - fused.activations == 2 * DEFAULT_CHUNK * 4096 * (2 * 32 - 1)
    assert (apart.weights, apart.kv, apart.engine) == (fused.weights, fused.kv, fused.engine)
    smaller = memory(llama, half, 4096, engine="tensorrt", lowering="decomposed17", chunk=DEFAULT_CHUNK // 4)
    assert smaller.activations < apart.activations / 3.9
    assert apart.total == apart.weights + apart.kv + apart.activations + apart.engine


@pytest.mark.parametrize("lowering", ["std24", "decomposed17"])
@pytest.mark.parametrize("budget", [5 * 2**30, 8 * 2**30, 16 * 2**30])
def test_the_longest_context_fits_and_the_next_does_not(llama: Sizes, lowering: str, budget: int) -> None:
    stored = precision("int4", "tensorrt")
    unbounded = replace(llama, max_positions=None)
    longest = largest_context(unbounded, stored, budget, engine="tensorrt", lowering=lowering)
    assert longest > 0
    assert memory(unbounded, stored, longest, engine="tensorrt", lowering=lowering).total <= budget
    assert memory(unbounded, stored, longest + 1, engine="tensorrt", lowering=lowering).total > budget


def test_the_longest_context_is_at_most_the_trained_length(llama: Sizes) -> None:
    assert (
        largest_context(llama, precision("int4", "tensorrt"), 2**40, engine="tensorrt", lowering="std24")
        == 4096
    )


def test_the_longest_context_is_0_if_the_weights_do_not_fit(llama: Sizes) -> None:
    assert (
        largest_context(
            llama, precision("float16", "tensorrt"), 4 * 2**30, engine="tensorrt", lowering="std24"
        )
        == 0
    )
