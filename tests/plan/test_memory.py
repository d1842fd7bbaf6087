"""`kvexport.plan.memory`: bytes computed by hand for a small model, and the longest context that fits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.anchors import CONFIGS

from kvexport.bundle.formats import PAGE, WeightFormats
from kvexport.engine.options import DEFAULT_CHUNK
from kvexport.plan.memory import kv_bytes_per_token, largest_context, memory
from kvexport.plan.sizes import Cache, Sizes, trained_sizes
from kvexport.plan.weights import precision

INT4 = precision("float16", WeightFormats("int4", "float16", "float16"))
SMALL = Sizes(
    num_heads=4,
    hidden=32,
    vocab=100,
    max_positions=None,
    matrices=12_800,
    small=70,
    embedding=3200,
    head=0,
    mlp_width=96,
    shapes={(40, 32): 10},
    caches=(Cache(2, 16), Cache(2, 16)),
)


@pytest.fixture
def llama(tmp_path: Path) -> Sizes:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["Llama-2-7B"]))
    return trained_sizes(tmp_path).with_kv_heads(32)


def test_weight_bytes_equal_a_computation_by_hand() -> None:
    """Maps [64, 128] and [127, 128]; an odd number of rows is stored in int8. Small tensors take one page,
    scales included."""
    sizes = replace(SMALL, matrices=2 * 64 * 128 + 127 * 128, shapes={(64, 128): 2, (127, 128): 1})
    float_numbers = sizes.matrices + 70 + 3200

    def total(dtype: str, weights: WeightFormats | None = None) -> int:
        return sizes.weight_bytes(precision(dtype, weights)).total

    assert total("float32") == 4 * float_numbers
    assert total("float16") == total("bfloat16") == 2 * float_numbers
    eight = 2 * 3 * PAGE + 5 * PAGE  # 8192 + 128 and 16256 + 254 bytes
    assert total("float16", WeightFormats("int8", "float16", "float16")) == eight + 2 * 3270
    four = 2 * 2 * PAGE + 5 * PAGE  # 4096 + 128 bytes
    assert total("float16", WeightFormats("int4", "float16", "float16")) == four + 2 * 3270
    wide = total("float32", WeightFormats("int4", "float32", "float32"))  # wider scales and other numbers
    assert wide == four + 4 * 3270


def test_embedding_and_head_have_bytes_of_their_own() -> None:
    """[100, 32] in float16, int8 and int4; a tied head has a table of its own if its format differs."""
    half, eight, four = 2 * 3200, 3200 + 2 * 100, 3200 // 2 + 2 * 100

    def tables(sizes: Sizes, embedding: str, head: str) -> tuple[int, int, int, int]:
        parts = sizes.weight_bytes(precision("float16", WeightFormats("float16", embedding, head, 32)))
        assert parts.total == parts.layers + parts.embedding + parts.head + parts.other
        return parts.embedding, parts.head, parts.scales, parts.total - parts.read

    tied, untied = replace(SMALL, shapes={}), replace(SMALL, shapes={}, head=3200)
    assert tables(tied, "float16", "float16") == (half, 0, 0, 0)
    assert tables(untied, "float16", "float16") == (half, half, 0, half)
    assert tables(tied, "int8", "int8") == (PAGE, 0, 2 * 100, 0)
    assert tables(tied, "float16", "int8") == (half, PAGE, 2 * 100, half)
    assert tables(untied, "int4", "float16") == (PAGE, half, 2 * 100, PAGE)
    assert max(eight, four) < PAGE


def test_llama_2_7b_caches_half_a_mebibyte_a_token(llama: Sizes) -> None:
    assert kv_bytes_per_token(llama, precision("float16")) == 2**19
    assert memory(llama, precision("float16"), 2048, engine="tensorrt", lowering="std24").kv == 2**30


def test_scores_take_memory_without_fused_attention(llama: Sizes) -> None:
    half = precision("float16")
    fused, apart = (
        memory(llama, half, 4096, engine="tensorrt", lowering=name) for name in ("std24", "decomposed17")
    )
    scores = 2 * DEFAULT_CHUNK * 4096 * (2 * 32 - 1)
    keys, expanded = 2**30, 2 * 2**25  # half of the cache; keys and values of one layer
    assert apart.activations - fused.activations == scores + keys + 2**23 - expanded
    assert (apart.weights, apart.kv, apart.engine) == (fused.weights, fused.kv, fused.engine)
    assert apart.io - fused.io == DEFAULT_CHUNK * 2**19  # new keys and values, which the runtime writes
    assert fused.io == 4 * 4 * 32_000
    smaller = memory(llama, half, 4096, engine="tensorrt", lowering="decomposed17", chunk=DEFAULT_CHUNK // 4)
    assert apart.activations - smaller.activations > 0.74 * scores
    assert apart.total == apart.weights + apart.kv + apart.activations + apart.io + apart.engine


def test_on_a_cpu_nothing_is_copied(llama: Sizes) -> None:
    one, two = (
        memory(llama, precision("float32"), slots, engine="onnxruntime", lowering="ort")
        for slots in (512, 513)
    )
    assert two.activations - one.activations == 4 * DEFAULT_CHUNK
    assert one.io == 4 * 32_000


@pytest.mark.parametrize("lowering", ["std24", "decomposed17"])
@pytest.mark.parametrize("budget", [5 * 2**30, 8 * 2**30, 16 * 2**30])
def test_the_longest_context_fits_and_the_next_does_not(llama: Sizes, lowering: str, budget: int) -> None:
    stored = INT4
    unbounded = replace(llama, max_positions=None)
    longest = largest_context(unbounded, stored, budget, engine="tensorrt", lowering=lowering)
    assert longest > 0
    assert memory(unbounded, stored, longest, engine="tensorrt", lowering=lowering).total <= budget
    assert memory(unbounded, stored, longest + 1, engine="tensorrt", lowering=lowering).total > budget


def test_the_longest_context_is_at_most_the_trained_length(llama: Sizes) -> None:
    assert largest_context(llama, INT4, 2**40, engine="tensorrt", lowering="std24") == 4096


def test_the_longest_context_is_0_if_the_weights_do_not_fit(llama: Sizes) -> None:
    assert largest_context(llama, precision("float16"), 4 * 2**30, engine="tensorrt", lowering="std24") == 0
