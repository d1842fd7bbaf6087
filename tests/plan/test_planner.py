"""`kvexport.plan.plan`: its rows, what fits, and comparisons with the records of a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.anchors import CONFIGS
from support.tiny_bundles import decoder_with_fewer_heads, write_bundle

from kvexport.devices.targets import load_target
from kvexport.errors import BundleError, UsageError
from kvexport.plan import plan


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    folder = tmp_path / "Qwen3-4B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS["Qwen3-4B"]))
    return folder


@pytest.fixture
def bundle(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    checkpoint = tiny_checkpoint("llama", num_key_value_heads=4, vocab_size=320)
    return write_bundle(tmp_path / "tiny", decoder_with_fewer_heads(checkpoint), dtype="float16", capacity=96)


def test_rows_are_all_dtypes_head_counts_and_contexts(qwen: Path) -> None:
    found = plan(qwen, load_target("orin-nano-8gb"))
    seen = [(row.formats.layers, row.kv_heads, row.memory.context) for row in found.rows]
    assert seen == [
        (d, k, c) for d in ("float16", "int8", "int4") for k in (8, 4, 2) for c in (2048, 8192, 32768)
    ]
    assert (found.model, found.lowering, found.maps) == ("Qwen3-4B", "decomposed17", True)
    assert plan(qwen, load_target("cpu")).rows[0].dtype == "float32"


def test_rows_are_the_requested_ones(qwen: Path) -> None:
    found = plan(
        qwen, load_target("h200"), kv_heads=[1], dtype="bfloat16", weights=["bfloat16"], contexts=[100, 200]
    )
    assert [(row.dtype, row.kv_heads, row.memory.context) for row in found.rows] == [
        ("bfloat16", 1, 100),
        ("bfloat16", 1, 200),
    ]


def test_finds_what_fits_an_8_gb_board(qwen: Path) -> None:
    target = load_target("orin-nano-8gb")
    rows = {(row.formats.layers, row.kv_heads, row.memory.context): row for row in plan(qwen, target).rows}
    large, small = rows["float16", 8, 2048], rows["int4", 2, 8192]
    assert large.short_bytes == large.memory.total - target.usable_bytes > 0
    assert large.largest_context == 0
    assert small.short_bytes == 0
    assert small.largest_context is not None
    assert small.largest_context >= 8192
    assert rows["int8", 8, 8192].short_bytes > 0  # type: ignore[operator]
    for row in rows.values():
        assert (row.short_bytes == 0) == (row.memory.context <= (row.largest_context or 0))


def test_predicts_only_memory_without_a_target(qwen: Path) -> None:
    for row in plan(qwen, None).rows:
        assert row.memory.total > 0
        assert (row.largest_context, row.short_bytes, row.prefill_seconds, row.decode_seconds) == (
            None,
            None,
            None,
            None,
        )
        assert row.to_json()["fits"] is None


def test_ranges_go_from_fast_to_slow(qwen: Path) -> None:
    for row in plan(qwen, load_target("thor-t5000")).rows:
        for seconds in (row.prefill_seconds, row.decode_seconds):
            assert seconds is not None
            assert 0 < seconds.low < seconds.typical < seconds.high


def test_rejects_a_context_beyond_the_model(qwen: Path) -> None:
    with pytest.raises(UsageError, match="must not exceed the maximum length"):
        plan(qwen, None, contexts=[40961])
    assert plan(qwen, None, contexts=[40960]).rows


def test_plans_a_short_model_at_its_own_length(tiny_checkpoint: Callable[..., Path]) -> None:
    assert {row.memory.context for row in plan(tiny_checkpoint("llama"), None).rows} == {256}
    assert {row.memory.context for row in plan(tiny_checkpoint("bloom"), None).rows} == {
        2048,
        8192,
        32768,
    }  # ALiBi: no bound


def test_a_model_without_rotation_has_no_maps(tiny_checkpoint: Callable[..., Path]) -> None:
    assert not plan(tiny_checkpoint("bloom"), None).maps
    assert plan(tiny_checkpoint("llama"), None).maps


def test_plans_a_bundle_with_its_own_heads_and_dtype(bundle: Path) -> None:
    (row,) = plan(bundle, load_target("orin-nano-8gb")).rows
    assert (row.dtype, row.kv_heads, row.memory.context) == ("float16", 4, 96)
    assert row.memory.weights == (bundle / "decoder.onnx.data").stat().st_size
    assert row.short_bytes == 0
    wrongs = {
        "kv_heads": [2],
        "dtype": "float16",
        "weights": ["int4"],
        "head_weights": "int8",
        "weight_block": 32,
    }
    for wrong in ({name: value} for name, value in wrongs.items()):
        with pytest.raises(UsageError, match="must be left out for a bundle"):
            plan(bundle, None, **wrong)
    with pytest.raises(UsageError, match="must not exceed the maximum length"):
        plan(bundle, None, contexts=[97])


def test_rejects_a_damaged_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").write_text("{}")
    with pytest.raises(BundleError):
        plan(bundle, None)


def record(bundle: Path, target: str = "rtx-4090", **changes: Any) -> Path:
    built = {
        "format": 1,
        "engine": "tensorrt-rtx",
        "lowering": "std24",
        "capacity": 96,
        "chunk": 32,
        "weights_bytes": 60_000,
        "plan": {"sha256": "0", "bytes": 80_000},
        "activation_bytes": 50_000,
        **changes,
    }
    folder = bundle / "engines" / target
    folder.mkdir(parents=True)
    (folder / "build.json").write_text(json.dumps(built, indent=1))
    return folder / "build.json"


def test_compares_a_build_with_its_prediction(bundle: Path) -> None:
    record(bundle)
    found = plan(bundle, None)
    (row,) = found.rows
    compared = {each.what: each for each in found.comparisons}
    assert set(compared) == {"weights", "plan", "activations", "device memory"}
    assert (compared["weights"].predicted, compared["weights"].measured) == (row.memory.weights, 60_000)
    assert (compared["plan"].predicted, compared["plan"].measured) == (row.memory.weights, 80_000)
    assert compared["plan"].ratio == 80_000 / row.memory.weights
    assert compared["activations"].measured == 50_000
    assert compared["activations"].predicted < row.memory.activations  # a chunk of 32 tokens, not of 96
    assert compared["device memory"].measured == 80_000 + 50_000 + row.memory.kv
    assert (
        compared["device memory"].predicted
        == row.memory.weights + row.memory.kv + compared["activations"].predicted
    )
    assert {each.source for each in found.comparisons} == {"rtx-4090/build.json"}


def test_a_build_record_may_lack_measurements(bundle: Path) -> None:
    record(bundle, activation_bytes=None, plan=None)
    assert [each.what for each in plan(bundle, None).comparisons] == ["weights"]


def test_compares_only_what_is_comparable(bundle: Path) -> None:
    path = record(bundle, options={"refit": True})
    assert [each.what for each in plan(bundle, None).comparisons] == ["weights", "activations"]
    path.write_text(json.dumps({**json.loads(path.read_text()), "options": {}, "batch": 2}))
    assert [each.what for each in plan(bundle, None).comparisons] == ["weights", "plan"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[1]", "null", '{"engine": 3}', '{"engine": "tensorrt"}', "\x00", "9" * 5000]
)
def test_ignores_an_unknown_record(bundle: Path, text: str) -> None:
    record(bundle).write_text(text)
    assert plan(bundle, None).comparisons == ()


def test_compares_a_benchmark_with_its_prediction(bundle: Path) -> None:
    (bundle / "bench").mkdir()
    lines = [
        {
            "decode": [{"depth": 0, "p50_ms": 1.5}, {"depth": 64, "p50_ms": 2.5}],
            "prefill": {"depth": 32, "p50_ms": 4},
        },
        {"target": "h200", "decode": {"depth": 0, "p50_ms": 99}},  # of another target
        {"decode": {"depth": 0, "p50_ms": "slow"}},
    ]
    (bundle / "bench" / "one.json").write_text("\n".join(map(json.dumps, lines)) + "\nnot JSON\n")
    target = load_target("orin-nano-8gb")
    found = plan(bundle, target, contexts=[64])
    compared = {each.what: each for each in found.comparisons}
    assert set(compared) == {"decode, 0 tokens", "decode, 64 tokens", "prefill, 32 tokens"}
    assert {each.unit for each in found.comparisons} == {"ms"}
    (row,) = found.rows
    assert row.decode_seconds is not None
    assert compared["decode, 64 tokens"].predicted == pytest.approx(1000 * row.decode_seconds.typical)
    assert compared["decode, 64 tokens"].measured == 2.5
    assert plan(bundle, None).comparisons == ()


@pytest.mark.parametrize(
    ("provider", "compared"), [("cpu", "cpu"), ("cuda", "orin-nano-8gb"), ("tensorrt", "orin-nano-8gb")]
)
def test_compares_cpu_and_gpu_benchmarks_with_their_own_targets_only(
    bundle: Path, provider: str, compared: str
) -> None:
    (bundle / "bench").mkdir()
    line = {"provider": provider, "decode": [{"depth": 0, "p50_ms": 1.5}]}
    (bundle / "bench" / "one.json").write_text(json.dumps(line))
    found = {target: plan(bundle, load_target(target)).comparisons for target in ("cpu", "orin-nano-8gb")}
    assert [target for target, comparisons in found.items() if comparisons] == [compared]


@pytest.mark.parametrize("absurd", [10**400, 1e300, float("inf"), float("nan"), 0, -1, True])
def test_ignores_an_absurd_value(bundle: Path, absurd: float) -> None:
    record(
        bundle,
        capacity=absurd,
        chunk=absurd,
        weights_bytes=absurd,
        activation_bytes=absurd,
        plan={"bytes": absurd},
    )
    (bundle / "bench").mkdir()
    points = [{"depth": absurd, "p50_ms": 1.5}, {"depth": 0, "p50_ms": absurd}]
    (bundle / "bench" / "one.json").write_text(json.dumps({"decode": points}))
    found = plan(bundle, load_target("orin-nano-8gb"))
    assert [each for each in found.comparisons if each.measured != 1.5] == []
    json.dumps(found.to_json(), allow_nan=False)


def test_rejects_a_bundle_without_its_graph(bundle: Path) -> None:
    (bundle / "decoder.onnx").unlink()
    with pytest.raises(BundleError, match=r"must contain decoder\.onnx"):
        plan(bundle, None)


def test_a_plan_can_be_written_as_json(bundle: Path) -> None:
    record(bundle)
    raw = json.loads(json.dumps(plan(bundle, load_target("rtx-4090")).to_json(), allow_nan=False))
    assert raw["target"] == "rtx-4090"
    assert raw["estimate"] is True
    (row,) = raw["rows"]
    assert row["fits"] is True
    assert row["total_bytes"] == sum(
        row["memory"][part] for part in ("weights", "kv", "activations", "io", "engine")
    )
    assert len(raw["comparisons"]) == 4
