"""Plans with eviction: cache bytes by hand and by the manifest, what fits, what a step reads, and errors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.anchors import CONFIGS
from support.tiny_bundles import write_bundle

from kvexport.bundle.manifest import Manifest, read_manifest
from kvexport.devices.targets import load_target
from kvexport.engine.options import DEFAULT_CHUNK
from kvexport.errors import UsageError
from kvexport.eviction.config import Eviction, EvictionRequest
from kvexport.model.decoder import Decoder, Layer
from kvexport.model.loader import load_decoder
from kvexport.plan import plan
from kvexport.plan.memory import (
    kv_bytes,
    kv_bytes_per_token,
    largest_context,
    memory,
    state_bytes,
)
from kvexport.plan.sizes import Cache, Sizes, bundle_sizes
from kvexport.plan.speed import decode_seconds, prefill_flops, prefill_seconds, step_bytes
from kvexport.plan.weights import precision

HALF = precision("float16")
MIXED = Sizes(
    num_heads=4,
    hidden=32,
    vocab=100,
    max_positions=1000,
    matrices=12_800,
    small=70,
    embedding=3200,
    head=0,
    mlp_width=96,
    caches=(Cache(4, 16), Cache(1, 48), Cache(2, 28)),
)
EVICTING = replace(MIXED, eviction=Eviction("window", 40, protect_first=4, skip_layers=(1,)))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS["Llama-2-7B"]))
    return folder


def test_cache_bytes_equal_a_computation_by_hand() -> None:
    """Two layers have 40 tokens, the second has all; state takes 8 bytes per slot and KV head in every
    dtype."""
    assert kv_bytes(EVICTING, HALF, 100) == 2 * (40 * 4 * 16 + 100 * 48 + 40 * 2 * 28) + 8 * 40 * (4 + 2)
    assert kv_bytes(EVICTING, precision("float32"), 100) == 2 * kv_bytes(EVICTING, HALF, 100) - 8 * 40 * 6
    assert kv_bytes(EVICTING, HALF, 7) == 7 * (2 * (4 * 16 + 48 + 2 * 28) + 8 * (4 + 2))
    assert state_bytes(EVICTING, 100) == state_bytes(EVICTING, 40) == 8 * 40 * 6
    assert kv_bytes(MIXED, HALF, 100) == 100 * kv_bytes_per_token(MIXED, HALF) == 100 * 2 * 168
    assert state_bytes(MIXED, 100) == 0


def test_memory_names_the_bytes_of_the_state() -> None:
    needed = memory(EVICTING, HALF, 100, engine="tensorrt", lowering="std24")
    assert (needed.kv, needed.kv_state) == (kv_bytes(EVICTING, HALF, 100), 8 * 40 * 6)
    assert needed.total == needed.weights + needed.kv + needed.activations + needed.io + needed.engine
    assert memory(MIXED, HALF, 100, engine="tensorrt", lowering="std24").kv_state == 0


def test_activations_depend_on_the_slots() -> None:
    """Heads 0..3 of the first layer have a mask of 40 slots each; the second layer has one mask of 100
    slots."""
    wide = 2 * 32 + max(96, (4 + 1) * 48)  # of the second layer

    def activations(sizes: Sizes, context: int, lowering: str) -> int:
        needed = memory(sizes, HALF, context, engine="tensorrt", lowering=lowering)
        slots = [sizes.cached_tokens(layer, context) for layer in range(3)]
        widths = [16, 48, 28]
        if lowering == "decomposed17":
            heads = [4, 1, 2]
            copies = sum(a * b * c for a, b, c in zip(slots, heads, widths, strict=True))
        else:
            copies = max(4 * a * b for a, b in zip(slots, widths, strict=True))
        return needed.activations - copies - 2**23

    chunk = (40 - 4) // 4
    assert activations(EVICTING, 100, "std24") == 2 * chunk * (wide + 4 * 40)
    assert activations(EVICTING, 500, "std24") == 2 * chunk * (wide + 500)
    assert activations(EVICTING, 100, "decomposed17") == 2 * chunk * (wide + 8 * 100)
    every = replace(EVICTING, eviction=Eviction("window", 40, protect_first=4))
    assert (
        activations(every, 100, "decomposed17")
        == activations(every, 900, "decomposed17")
        == 2 * chunk * (wide + 8 * 40)
    )
    assert activations(MIXED, 900, "decomposed17") == 2 * DEFAULT_CHUNK * (wide + 8 * 900)


def test_a_step_reads_the_cached_tokens() -> None:
    rest = step_bytes(EVICTING, HALF, 0)
    assert rest == step_bytes(MIXED, HALF, 0)
    for depth in (1, 39, 40, 41, 900):
        assert step_bytes(EVICTING, HALF, depth) == rest + kv_bytes(EVICTING, HALF, depth)
    every, target = replace(EVICTING, eviction=Eviction("window", 40)), load_target("agx-orin-64gb")
    after = [decode_seconds(every, HALF, target, depth, 0.8) for depth in (39, 40, 41, 900)]
    assert after[0] < after[1] == after[2] == after[3]


def test_a_prompt_attends_to_the_cached_tokens_in_smaller_chunks() -> None:
    linear = 2 * 12_800 * 100 + 2 * 3200
    assert prefill_flops(MIXED, 100) == linear + 4 * (16 + 48 + 28) * 100 * 100
    assert prefill_flops(EVICTING, 100) == linear + 4 * ((16 + 28) * (100 * 100 - 60 * 60) + 48 * 100 * 100)
    target = load_target("agx-orin-64gb")
    whole, pieces = (prefill_seconds(sizes, HALF, target, 900, 1e6, 0.8) for sizes in (MIXED, EVICTING))
    step = decode_seconds(MIXED, HALF, target, 0, 0.8)
    assert (whole, pieces) == (pytest.approx(-(-900 // DEFAULT_CHUNK) * step), pytest.approx(900 // 9 * step))
    assert EVICTING.chunk == 9


def test_with_a_budget_only_positions_limit_the_context() -> None:
    every = replace(MIXED, max_positions=10**5, eviction=Eviction("window", 40))
    enough = memory(every, HALF, 40, engine="tensorrt", lowering="decomposed17").total

    def longest(sizes: Sizes, room: int) -> int:
        return largest_context(sizes, HALF, room, engine="tensorrt", lowering="decomposed17")

    assert longest(every, enough) == 10**5
    assert longest(every, enough - 1) == 39
    bounded = longest(replace(every, eviction=Eviction("window", 40, skip_layers=(1,))), enough)
    assert 0 < bounded < 40 * 8  # the second layer caches every token and has no other bound
    assert longest(replace(every, eviction=None), enough) < 40


def wide_layer(layer: Layer, heads: int, key_dim: int, value_dim: int, seed: int) -> Layer:
    """A layer of four trained KV heads with `heads` cached ones of other widths."""
    attention, generator = layer.attention, torch.Generator().manual_seed(seed)
    width, hidden = attention.head_dim, attention.q.weight.shape[1]

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator) / size[-2] ** 0.5

    changed = dataclasses.replace(
        attention,
        num_kv_heads=heads,
        key_map=random(heads, 4 // heads * width, key_dim),
        query_map=random(4, width, key_dim),
        v=dataclasses.replace(attention.v, weight=random(heads * value_dim, hidden)),
        value_map=random(4, value_dim, width),
    )
    return dataclasses.replace(layer, attention=changed)


@pytest.fixture
def decoder(tiny_checkpoint: Callable[..., Path]) -> Decoder:
    """Layers of four heads as trained, one of 32 and 20, and two of 14 and 18 numbers."""
    decoder = load_decoder(
        tiny_checkpoint("llama", num_key_value_heads=4, num_hidden_layers=3, vocab_size=320)
    )
    layers = list(decoder.layers)
    layers[1], layers[2] = wide_layer(layers[1], 1, 32, 20, 1), wide_layer(layers[2], 2, 14, 18, 2)
    return dataclasses.replace(decoder, layers=layers)


def planned(path: Path) -> tuple[Sizes, Manifest]:
    manifest = read_manifest(path)
    return bundle_sizes(path, manifest), manifest


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "eviction",
    [
        None,
        Eviction("window", 24, protect_first=4),
        Eviction("l2-norm", 24, 2, 5, (0, 2)),
        Eviction("random", 96, 0, 0, (1,)),
    ],
    ids=["none", "window", "skipping", "at capacity"],
)
def test_the_bytes_of_a_bundle_equal_those_of_its_manifest(
    decoder: Decoder, tmp_path: Path, dtype: str, eviction: Eviction | None
) -> None:
    sizes, manifest = planned(
        write_bundle(tmp_path / "bundle", decoder, dtype=dtype, capacity=96, eviction=eviction)
    )
    stored = precision(dtype)
    assert [cache.heads * cache.width for cache in sizes.caches] == [4 * 16, 52, 2 * 32]
    assert kv_bytes_per_token(sizes, stored) == manifest.kv_bytes_per_token
    for tokens in (1, 23, 24, 25, 95, 96):
        assert kv_bytes(sizes, stored, tokens) == manifest.kv_bytes(tokens)
        (row,) = plan(tmp_path / "bundle", None, contexts=[tokens]).rows
        assert row.memory.kv == manifest.kv_bytes(tokens)
    assert sizes.weight_bytes(stored).total == row.memory.weights == manifest.files["decoder.onnx.data"].bytes
    assert row.memory.weights == (tmp_path / "bundle" / "decoder.onnx.data").stat().st_size
    others = [Eviction("window", 23), Eviction("window", 24, skip_layers=(0,)), None]
    for other in others:
        if other is None and eviction is None:
            continue
        assert kv_bytes(replace(sizes, eviction=other), stored, 96) != manifest.kv_bytes(96)


def test_plans_a_bundle_with_its_own_budget(decoder: Decoder, tmp_path: Path) -> None:
    eviction = Eviction("l2-norm", 24, 2, 5, (0, 2))
    found = plan(
        write_bundle(tmp_path / "bundle", decoder, capacity=96, eviction=eviction), load_target("cpu")
    )
    assert found.eviction == eviction
    assert found.to_json()["eviction"] == eviction.to_json()
    (row,) = found.rows
    assert (row.memory.context, row.memory.kv_state) == (96, 8 * 24)
    assert row.memory.kv == 4 * (96 * (64 + 64) + 24 * 52) + 8 * 24
    assert row.largest_context == 96


@pytest.mark.parametrize("eviction", [None, Eviction("window", 24)])
def test_rejects_another_budget_for_a_bundle(
    decoder: Decoder, tmp_path: Path, eviction: Eviction | None
) -> None:
    path = write_bundle(tmp_path / "bundle", decoder, eviction=eviction)
    with pytest.raises(UsageError, match="kvexport build CHECKPOINT -o BUNDLE --kv-budget") as raised:
        plan(path, None, eviction=EvictionRequest(16))
    assert raised.value.expected == ("no eviction" if eviction is None else "24 tokens in each KV head")


def test_compares_an_engine_of_a_bundle_that_evicts_by_equal_bytes(decoder: Decoder, tmp_path: Path) -> None:
    path = write_bundle(
        tmp_path / "bundle", decoder, dtype="float16", capacity=96, eviction=Eviction("window", 24, 4)
    )
    folder = path / "engines" / "rtx-4090"
    folder.mkdir(parents=True)
    built = {
        "engine": "tensorrt-rtx",
        "lowering": "std24",
        "capacity": 96,
        "plan": {"bytes": 80_000},
        "activation_bytes": 50_000,
    }
    (folder / "build.json").write_text(json.dumps(built))
    (path / "bench").mkdir()
    (path / "bench" / "one.json").write_text(
        json.dumps({"decode": [{"depth": depth, "p50_ms": 1} for depth in (24, 90)]})
    )
    found = plan(path, load_target("rtx-4090"))
    compared, (row,) = {each.what: each for each in found.comparisons}, found.rows
    cache_bytes = 2 * 24 * (64 + 52 + 64) + 8 * 24 * 7
    assert (row.memory.kv, read_manifest(path).kv_bytes(96)) == (cache_bytes, cache_bytes)
    assert compared["device memory"].measured == 80_000 + 50_000 + cache_bytes
    assert compared["device memory"].predicted == row.memory.weights + row.memory.activations + cache_bytes
    assert (
        compared["activations"].predicted == row.memory.activations
    )  # five tokens at once, as the runtime does
    assert compared["decode, 90 tokens"].predicted == compared["decode, 24 tokens"].predicted


def test_a_fraction_is_one_of_the_models_positions(llama: Path) -> None:
    eviction = EvictionRequest.parse("0.25", skip_layers=(0, 31))
    found = plan(
        llama, load_target("orin-nano-8gb"), weights=["int4"], contexts=[512, 4096], eviction=eviction
    )
    assert found.eviction is not None
    assert (found.eviction.budget, found.eviction.skip_layers) == (1024, (0, 31))
    rows = {(row.kv_heads, row.memory.context): row for row in found.rows}
    for heads in (32, 16, 8):
        token = heads * 256 * 2
        assert rows[heads, 512].memory.kv == 32 * 512 * token + 30 * 512 * heads * 8
        assert rows[heads, 4096].memory.kv == 2 * 4096 * token + 30 * 1024 * (token + heads * 8)
        assert rows[heads, 4096].memory.kv_state == 30 * 1024 * heads * 8
        assert rows[heads, 4096].kv_bytes_per_token == 32 * token
    asked = plan(
        llama, load_target("orin-nano-8gb"), weights=["int4"], contexts=[4096], eviction=EvictionRequest(1024)
    )
    assert asked.rows[0].memory.kv == 32 * 1024 * 32 * (512 + 8)
    without = plan(llama, load_target("orin-nano-8gb"), weights=["int4"], contexts=[4096])
    assert (without.eviction, without.to_json()["eviction"]) == (None, None)
    assert without.rows[0].memory.kv == 4096 * 32 * 32 * 512


def test_a_longer_context_fits_with_a_budget(llama: Path) -> None:
    def longest(eviction: EvictionRequest | None) -> int | None:
        target = load_target("orin-nano-8gb-super")
        options: dict[str, Any] = {"kv_heads": [16], "weights": ["int4"], "weight_bits": 4.2}
        return plan(llama, target, **options, contexts=[512], eviction=eviction).rows[0].largest_context

    full, bounded = longest(None), longest(EvictionRequest(256))
    assert full is not None
    assert 256 < full < 4096 == bounded


def test_rejects_a_fraction_for_a_model_without_a_maximum_length(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    bloom = tiny_checkpoint("bloom")
    with pytest.raises(UsageError, match="without a maximum length"):
        plan(bloom, None, eviction=EvictionRequest.parse("0.5"))
    rows = plan(bloom, load_target("h200"), eviction=EvictionRequest(64)).rows
    assert {row.largest_context for row in rows} == {
        2**19
    }  # the most positions that a cache with a budget counts


def test_plans_a_model_up_to_the_positions_that_eviction_can_count(llama: Path) -> None:
    config: dict[str, Any] = {**CONFIGS["Llama-2-7B"], "max_position_embeddings": 10**6}
    (llama / "config.json").write_text(json.dumps(config))
    assert plan(llama, None, contexts=[2**19], eviction=EvictionRequest(64)).rows
    assert plan(llama, None, contexts=[10**6]).rows
    with pytest.raises(UsageError, match="must not exceed the maximum length"):
        plan(llama, None, contexts=[2**19 + 1], eviction=EvictionRequest(64))


@pytest.mark.parametrize(
    ("eviction", "what"),
    [
        (EvictionRequest(4097), "must be at most the capacity"),
        (EvictionRequest(3), "must leave a token"),
        (EvictionRequest(64, skip_layers=(32,)), "must name layers of the model"),
        (EvictionRequest(64, skip_layers=tuple(range(32))), "must leave a layer that evicts"),
    ],
)
def test_rejects_an_impossible_budget(llama: Path, eviction: EvictionRequest, what: str) -> None:
    with pytest.raises(UsageError, match=what) as raised:
        plan(llama, None, eviction=eviction)
    assert "--capacity" not in str(raised.value.fix)  # that is an option of `kvexport build`
