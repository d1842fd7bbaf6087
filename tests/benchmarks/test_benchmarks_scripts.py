"""The benchmark scripts without tests of their own run at a tiny size and write their records."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.decoders import make_decoder
from support.tiny_bundles import write_bundle

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., tuple[Any, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(name, *arguments, **constants)`: set a script's constants and run it; its module and its
    output."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(name: str, *arguments: object, **constants: Any) -> tuple[Any, str]:
        module = importlib.import_module(name)
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        module.main()
        return module, capsys.readouterr().out

    return run


def is_summary(times: dict[str, Any], samples: int) -> bool:
    low, high = times["quartiles"]
    return low <= times["median"] <= high and len(times["raw"]) == samples


@pytest.mark.slow
def test_runtime_costs(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    arguments = ("--depth", 16, "--steps", 4, "--starts", 2, "--output", output)
    _, printed = run("runtime_costs", *arguments, CAPACITIES=(256, 512))
    record = json.loads(output.read_text())
    assert is_summary(record["help_seconds"], 2)
    assert list(record["decode_step_ms"]) == ["capacity limit 256", "capacity limit 512"]
    assert all(is_summary(times, 4) for times in record["decode_step_ms"].values())
    assert "kvexport --help, seconds: median" in printed and "capacity limit 512, milliseconds" in printed


def test_cache_write(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    arguments = ("--threads", 1, "--repetitions", 3, "--output", output)
    _, printed = run("cache_write", *arguments, SHAPES={"tiny": (4, 2, 8)}, DEPTHS=(16,))
    forms = json.loads(output.read_text())["layer_step_ms"]["tiny, depth 16"]
    assert list(forms) == ["slice", "scatter", "concat"] and all(
        is_summary(times, 3) for times in forms.values()
    )
    assert printed.startswith("tiny, depth 16: slice ")


@pytest.mark.slow
def test_build_cost(run: Run, tmp_path: Path) -> None:
    output, folder = tmp_path / "record.json", tmp_path / "work"
    shape = {"hidden": 64, "intermediate": 96, "vocab": 320}
    grouped = shape | {"layers": 1, "kv_heads": 1, "head_dim": 32}
    names = ("llama-1", "llama-2", "llama-8b-int4")
    arguments = (folder, "--samples", 8, "--threads", 1, "--output", output, "--only", *names)
    _, printed = run("build_cost", *arguments, LAYERS=(1, 2), SHAPE=shape, LLAMA_8B=grouped)
    record = json.loads(output.read_text())
    assert tuple(record["cases"]) == names
    assert list(record["cost_per_layer"]) == ["1 to 2 layers"]
    quantized = record["cases"].pop("llama-8b-int4")["builds"]["1"]
    assert quantized["bundle_bytes"] < record["cases"]["llama-1"]["builds"]["0.5"]["bundle_bytes"]
    for case in record["cases"].values():
        assert len(case["forward_passes"]) == 2
        first, second = case["builds"].values()
        assert "analysis" in first["seconds_by_stage"] and "analysis" not in second["seconds_by_stage"]
        assert 0 < max(first["peak_resident_bytes_by_stage"].values()) == first["peak_resident_bytes"]
        assert first["kl_on_held_out_calibration_text"] < second["kl_on_held_out_calibration_text"]
    assert "llama-2 at 0.25: " in printed
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_embed(run: Run, tmp_path: Path) -> None:
    """With a program in place of the C++ one, whose own test is in tests/cpp."""
    bundle = write_bundle(tmp_path / "bundle", make_decoder("llama", layers=1))
    program = tmp_path / "step_overhead"
    program.write_text('#!/bin/sh\necho \'{"step_us": [3, 4, 5, 6], "engine_us": [2, 2, 2, 2]}\'\n')
    program.chmod(0o755)
    output = tmp_path / "record.json"
    arguments = (bundle, "--build", tmp_path, "--depth", 8, "--steps", 4, "--rounds", 1, "--output", output)
    _, printed = run("embed", *arguments)
    record = json.loads(output.read_text())
    assert record["overhead_us"]["c++"]["raw"] == [1, 2, 3, 4]
    assert is_summary(record["overhead_us"]["python"], 4) and record["import_seconds"]["median"] > 0
    assert "c++: " in printed and "python: " in printed


@pytest.mark.slow
def test_decode_cpu(run: Run, tmp_path: Path) -> None:
    """Without onnxruntime-genai, which no extra of kvexport installs."""
    pytest.importorskip("transformers")
    sides = ("kvexport, 16 KV heads", "kvexport, 4 KV heads", "transformers, 16 KV heads")
    shape = {
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    _, printed = run(
        "decode_cpu",
        *("--threads", 1, "--steps", 4, "--repetitions", 2, "--layers", 1, "--output", tmp_path),
        SHAPE=shape,
        SIDES=sides,
        DEPTHS=(64,),
        PROMPTS=(64,),
        PACKAGES=("onnxruntime", "torch", "transformers"),
        TARGETS=(("decode", 64, sides[0], sides[2], 0.001),),
    )
    record = json.loads((tmp_path / "decode_cpu.json").read_text())
    assert set(record["decode"]["64"]) == set(record["prefill"]["64"]) == set(sides)
    assert record["targets"][0]["reached"] is True
    assert (tmp_path / "decode_cpu.md").read_text() in printed
    assert "| kvexport, 4 KV heads |" in printed


@pytest.mark.slow
def test_decode_int4_and_run_memory(run: Run, tmp_path: Path) -> None:
    """Without onnxruntime-genai and llama.cpp, which no extra of kvexport installs."""
    _, printed = run(
        "decode_int4",
        *(ROOT / "models" / "demo", "--threads", 1, "--steps", 4, "--repetitions", 2),
        *("--work", tmp_path, "--output", tmp_path),
        SIDES=("kvexport",),
        DEPTHS=(16,),
        PROMPTS=(16,),
        PACKAGES=("onnxruntime",),
        TARGETS=(("decode", 16, "kvexport", "kvexport", 1.0),),
        NEXT="",  # the demo model continues no series
    )
    record = json.loads((tmp_path / "decode_int4-1.json").read_text())
    assert len(record["decode"]["16"]["kvexport"]["raw_ms"]) == 4
    assert record["targets"][0]["times_as_fast"] == 1 and record["times"] == "processor time of the thread"
    assert (tmp_path / "decode_int4-1.md").read_text() in printed

    output = tmp_path / "memory.json"
    arguments = ("--prompts", 8, "--new-tokens", 2, "--threads", 1, "--output", output)
    _, printed = run("run_memory", tmp_path / "kvexport", *arguments)
    (memory,) = json.loads(output.read_text())["runs"]
    assert memory["weights_bytes"] == (tmp_path / "kvexport" / "decoder.onnx.data").stat().st_size
    assert 0 < memory["cache_bytes"] < memory["peak_bytes"]
    assert memory["ratio_without_imports"] < memory["ratio"]
    assert "kvexport, prompt of 8: peak" in printed
