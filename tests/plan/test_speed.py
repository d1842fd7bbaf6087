"""`kvexport.plan.speed`: published speeds within 25 %, the fit of the docstring, and physical bounds."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from support.anchors import CONFIGS, FITTED, HELD_OUT, PREFILL_SECONDS, SLOWER, TOO_FAST, Anchor

from kvexport.bundle.formats import WeightFormats
from kvexport.devices.targets import load_target
from kvexport.plan.sizes import Sizes, trained_sizes
from kvexport.plan.speed import (
    DECODE,
    LAYER_SECONDS,
    PREFILL,
    decode_seconds,
    prefill_flops,
    prefill_seconds,
    step_bytes,
)
from kvexport.plan.weights import precision

INT4 = precision("float16", WeightFormats("int4", "float16", "float16"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sizes]:
    folder = tmp_path_factory.mktemp("configs")
    found = {}
    for name, config in CONFIGS.items():
        (folder / "config.json").write_text(json.dumps(config))
        trained = trained_sizes(folder)
        found[name] = trained.with_kv_heads(trained.architecture.num_kv_heads)
    return found


def predicted(anchor: Anchor, models: dict[str, Sizes], efficiency: float) -> float:
    stored = INT4 if anchor.weights == "int4" else precision(anchor.weights)
    return 1 / decode_seconds(
        models[anchor.model], stored, load_target(anchor.target), anchor.depth, efficiency
    )


@pytest.mark.parametrize("anchor", FITTED + HELD_OUT, ids=str)
def test_predicts_a_published_decode_speed_within_25_percent(
    anchor: Anchor, models: dict[str, Sizes]
) -> None:
    assert predicted(anchor, models, DECODE.typical) == pytest.approx(anchor.tokens_per_second, rel=0.25)


@pytest.mark.parametrize("anchor", TOO_FAST, ids=str)
def test_figures_that_contradict_others_are_missed_by_a_known_factor(
    anchor: Anchor, models: dict[str, Sizes]
) -> None:
    """The docstring of `kvexport.plan.speed` names them; a change that predicts them belongs there."""
    assert 1.25 < predicted(anchor, models, DECODE.typical) / anchor.tokens_per_second < 1.40


@pytest.mark.parametrize("anchor", FITTED, ids=str)
def test_a_published_decode_speed_is_within_the_band(anchor: Anchor, models: dict[str, Sizes]) -> None:
    assert predicted(anchor, models, DECODE.low) <= 1.01 * anchor.tokens_per_second
    assert predicted(anchor, models, DECODE.high) >= 0.99 * anchor.tokens_per_second


@pytest.mark.parametrize("anchor", SLOWER, ids=str)
def test_runtimes_without_the_kernel_are_below_the_band(anchor: Anchor, models: dict[str, Sizes]) -> None:
    """Negative control: these speeds would fail the tests above."""
    assert predicted(anchor, models, DECODE.low) > 1.5 * anchor.tokens_per_second


def test_the_constants_are_the_least_squares_fit(models: dict[str, Sizes]) -> None:
    """A least-squares search on a grid gives the constants of the code, with the residuals of its
    docstring."""

    known = []
    for anchor in FITTED:
        sizes = models[anchor.model]
        least = step_bytes(sizes, INT4, anchor.depth) / load_target(anchor.target).bandwidth
        known.append((sizes.layers, least, anchor.tokens_per_second))

    def residuals(efficiency: float, layer: float) -> list[float]:
        return [-math.log((layers * layer + least / efficiency) * figure) for layers, least, figure in known]

    grid = [(efficiency / 200, layer * 1e-6) for efficiency in range(130, 200) for layer in range(60)]
    best = min(grid, key=lambda point: sum(each**2 for each in residuals(*point)))
    assert best == pytest.approx((DECODE.typical, LAYER_SECONDS), rel=0.04)
    found = residuals(DECODE.typical, LAYER_SECONDS)
    assert math.sqrt(sum(each**2 for each in found) / len(found)) < 0.08
    assert max(map(abs, found)) < math.log(1.13)


def test_the_band_is_the_range_of_the_published_speeds(models: dict[str, Sizes]) -> None:
    implied = []
    for anchor in FITTED:
        sizes = models[anchor.model]
        seconds = 1 / anchor.tokens_per_second - sizes.layers * LAYER_SECONDS
        implied.append(step_bytes(sizes, INT4, anchor.depth) / load_target(anchor.target).bandwidth / seconds)
    assert min(implied) == pytest.approx(DECODE.low, abs=0.005)
    assert max(implied) == pytest.approx(DECODE.high, abs=0.005)


def test_prefill_efficiency_follows_from_the_published_speeds(models: dict[str, Sizes]) -> None:
    flops = prefill_flops(models["Qwen3-8B"], 2048)
    implied = [
        flops / seconds / (load_target(name).fp16 or math.nan) for name, seconds in PREFILL_SECONDS.items()
    ]
    assert min(implied) == pytest.approx(PREFILL.low, abs=0.005)
    assert max(implied) == pytest.approx(PREFILL.high, abs=0.005)
    assert math.prod(implied) ** (1 / 3) == pytest.approx(PREFILL.typical, abs=0.005)
    for name, seconds in PREFILL_SECONDS.items():
        target = load_target(name)
        slow, fast = (
            prefill_seconds(models["Qwen3-8B"], INT4, target, 2048, efficiency, DECODE.typical, chunk=2048)
            or 0
            for efficiency in (PREFILL.low, PREFILL.high)
        )
        assert 0.99 * fast <= seconds <= 1.01 * slow


def test_float16_llama_is_slower_than_its_bytes_allow(models: dict[str, Sizes]) -> None:
    """13.2 GB of weights at 204.8 GB/s: at most 15.5 tokens a second."""
    half, agx = precision("float16"), load_target("agx-orin-64gb")
    assert 12 < 1 / decode_seconds(models["Llama-2-7B"], half, agx, 0, DECODE.typical) < 15.5


def test_fewer_kv_heads_help_more_the_longer_the_context(models: dict[str, Sizes], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["Llama-2-7B"]))
    whole, quarter = (trained_sizes(tmp_path).with_kv_heads(count) for count in (32, 8))
    agx = load_target("agx-orin-64gb")
    gains = [
        decode_seconds(whole, INT4, agx, depth, DECODE.typical)
        / decode_seconds(quarter, INT4, agx, depth, DECODE.typical)
        for depth in (0, 1024, 4096)
    ]
    assert gains[0] < 1.1  # less to read even then: W_V shrinks
    assert gains[0] < gains[1] < gains[2]
    assert 1.3 < gains[2] < 1.6


def test_a_step_reads_a_tied_head_but_no_embedding_table(models: dict[str, Sizes]) -> None:
    sizes = models["Qwen3-4B"]
    untied = replace(sizes, head=sizes.embedding)
    assert step_bytes(sizes, INT4, 100) == step_bytes(untied, INT4, 100)
    assert step_bytes(sizes, INT4, 0) > 2 * sizes.embedding


def test_prefill_is_never_faster_than_reading_the_weights_once(models: dict[str, Sizes]) -> None:
    nano, sizes = load_target("orin-nano-8gb"), models["Qwen3-1.7B"]
    assert prefill_seconds(sizes, INT4, nano, 1, PREFILL.high, DECODE.typical) == decode_seconds(
        sizes, INT4, nano, 0, DECODE.typical
    )


def test_small_chunks_read_the_weights_again(models: dict[str, Sizes]) -> None:
    thor, sizes = load_target("thor-t5000"), models["Qwen3-8B"]
    whole, pieces = (
        prefill_seconds(sizes, INT4, thor, 2048, PREFILL.high, DECODE.typical, chunk=chunk) or 0
        for chunk in (2048, 64)
    )
    assert pieces == pytest.approx(32 * decode_seconds(sizes, INT4, thor, 0, DECODE.typical))
    assert pieces > 3 * whole


def test_predicts_no_prefill_without_a_rate(models: dict[str, Sizes]) -> None:
    sizes = models["Qwen3-0.6B"]
    assert prefill_seconds(sizes, precision("float32"), load_target("cpu"), 512, 0.5, 0.5) is None
    assert prefill_seconds(sizes, precision("float32"), load_target("h200"), 512, 0.5, 0.5) is None
