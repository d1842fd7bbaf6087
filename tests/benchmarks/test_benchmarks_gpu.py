"""`benchmarks/gpu/run.py` without a GPU: it exits, rehearses, and records failures."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.simulated_gpus import SimulatedGpu, simulate_gpus

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "benchmarks" / "gpu"
# A machine that has a GPU hides it: what is tested is what happens without.
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def _run(*arguments: object, script: str = "run.py") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(GPU / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)


def _records(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`module(name)`: one of the command's own modules, forgotten afterwards."""
    monkeypatch.syspath_prepend(str(GPU))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (
            getattr(sys.modules[name], "__file__", None)
            and Path(str(sys.modules[name].__file__)).parent == GPU
        ):
            del sys.modules[name]


def test_exits_without_a_gpu_and_runs_nothing(tmp_path: Path) -> None:
    ended = _run("--output", tmp_path / "records", "--work", tmp_path / "work")
    assert ended.returncode == 3
    assert "no NVIDIA GPU" in ended.stderr and "--rehearse" in ended.stderr
    assert not ended.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["", "gpu", "gpu/../gpu"])
def test_rejects_a_rehearsal_with_an_output_in_results(folder: str) -> None:
    before = sorted((ROOT / "benchmarks" / "results").rglob("*"))
    ended = _run("--rehearse", "--only", "memory", "--output", ROOT / "benchmarks" / "results" / folder)
    assert ended.returncode == 2 and "no result" in ended.stderr
    assert sorted((ROOT / "benchmarks" / "results").rglob("*")) == before


def test_rejects_an_unknown_part(tmp_path: Path) -> None:
    ended = _run("--rehearse", "--only", "memory,speed", "--output", tmp_path / "records")
    assert ended.returncode == 2 and "no part speed" in ended.stderr


def test_records_a_failed_part_and_continues(tmp_path: Path) -> None:
    ended = _run(
        "--rehearse",
        "--only",
        "memory,engine-std24",
        "--work",
        tmp_path / "work",
        "--output",
        tmp_path / "records",
    )
    assert ended.returncode == 1, ended.stderr
    records = _records(tmp_path / "records")
    assert set(records) == {"memory", "engine-std24"}
    for record in records.values():
        assert (record["status"], record["exit_code"], record["timed_out"]) == ("failed", 1, False)
        assert "part models must run first" in record["failures"][0]
        assert record["last_words"] and record["rehearsal"] is True
    assert "part models must run first" in ended.stdout


def test_records_a_part_without_time_left(tmp_path: Path) -> None:
    ended = _run("--rehearse", "--only", "memory", "--deadline", 1, "--output", tmp_path / "records")
    assert ended.returncode == 1
    record = _records(tmp_path / "records")["memory"]
    assert record["failures"] == ["no time was left"] and record["exit_code"] is None


def test_ends_a_process_at_its_limit_with_its_children(tmp_path: Path, module: Any) -> None:
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    parent = (
        f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        "print(child.pid, flush=True); child.wait()"
    )
    begin = time.monotonic()
    ended = module("processes").run_limited([sys.executable, "-c", parent], 2, tmp_path / "log", os.environ)
    assert ended.timed_out and ended.exit_code < 0 and time.monotonic() - begin < 20
    for _ in range(100):
        if not _alive(int(ended.last_words[0])):
            return
        time.sleep(0.05)
    raise AssertionError("what it had started still runs")


def test_keeps_the_exit_code_and_the_last_lines_of_a_process(tmp_path: Path, module: Any) -> None:
    said = "import sys; [print(n) for n in range(100)]; print('why', file=sys.stderr); sys.exit(7)"
    ended = module("processes").run_limited(
        [sys.executable, "-u", "-c", said], 30, tmp_path / "log", os.environ
    )
    assert (ended.exit_code, ended.timed_out) == (7, False)
    assert ended.last_words[-2:] == ["99", "why"] and len(ended.last_words) == 40


def test_describes_the_gpu_and_watches_its_memory(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_gpus(
        monkeypatch,
        SimulatedGpu("NVIDIA H200", "9.0", 143771 * 2**20, temperature_c=40, memory_used=(100, 900, 300)),
    )
    machine = module("machine")
    facts = machine.describe_gpu()
    assert (
        facts["name"] == "NVIDIA H200"
        and facts["compute_capability"] == "9.0"
        and facts["memory"] == 143771 * 2**20
        and facts["temperature_c"] == 40
    )
    with machine.MemoryWatch() as watch:
        time.sleep(0.6)
    assert (watch.before, watch.used) == (100 * 2**20, 800 * 2**20)


def test_without_a_gpu_the_description_is_none(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_gpus(monkeypatch)
    machine = module("machine")
    with machine.MemoryWatch() as watch:
        pass
    assert machine.describe_gpu() is None and watch.used is None and "python" in machine.versions()


def test_records_do_not_contain_paths_of_the_machine(tmp_path: Path, module: Any) -> None:
    said = f"no {tmp_path}/bundle-8, nor {ROOT}/kvexport"
    assert module("machine").without_paths(said, tmp_path) == "no WORK/bundle-8, nor REPOSITORY/kvexport"


class FakePart:
    """Collects failures."""

    def __init__(self, settings: Any) -> None:
        self.settings, self.failures = settings, []

    def failed(self, what: str) -> None:
        self.failures.append(what)


@pytest.mark.parametrize(
    ("change", "failures"),
    [({}, 0), ({"logits": 0.01}, 1), ({"kl": 1.02}, 1), ({"heads": 4}, 1), ({"logits": float("nan")}, 1)],
    ids=str,
)
def test_compares_the_builds_of_two_devices(
    tmp_path: Path, module: Any, change: dict[str, float], failures: int
) -> None:
    convert, part = module("part_convert"), FakePart(module("settings").rehearsal(tmp_path))
    reports, logits = [], np.random.default_rng(0).normal(size=(4, 9))
    for at, (kl, error, heads) in enumerate(
        [(0.1, 0, 2), (0.1 * change.get("kl", 1), change.get("logits", 0), change.get("heads", 2))]
    ):
        folder = convert.folder(part, "demo", at)
        folder.mkdir()
        np.savez(folder / "reference.npz", logits=logits + error * np.abs(logits).max())
        layer = {"method": "fold", "num_key_value_heads": heads, "key_head_dim": 8, "value_head_dim": 8}
        reports.append(
            {
                "layers": [layer],
                "device": f"device {at}",
                "divergence": {"mean_kl": kl},
                "validation": {"failures": []},
                "seconds": {"convert": 1.5},
            }
        )
    found = convert.compare(part, *reports)
    assert len(part.failures) == failures, part.failures
    text = "\n".join(
        module("summary")._convert({"demo": found, "seconds_by_stage": {"cpu": {"convert": 1.5}}})
    )
    assert ("ANOTHER PLAN" in text) == ("heads" in change) and "| cpu | 1.5 |" in text


@pytest.mark.slow
def test_rehearses_the_conversion(tmp_path: Path) -> None:
    ended = _run(
        "--rehearse", "--only", "convert", "--work", tmp_path / "work", "--output", tmp_path / "records"
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = _records(tmp_path / "records")["convert"]["result"]
    assert result["demo"]["same_plan"] and result["demo"]["logits"] == result["demo"]["kl"] == 0
    assert list(result["seconds_by_stage"]) == ["0: cpu", "1: cpu"]
    assert "A build on the GPU against one on the CPU" in ended.stdout


@pytest.mark.slow
@pytest.mark.tensorrt
def test_tries_every_way_on_an_unlisted_gpu_and_records_the_outcome(tmp_path: Path, module: Any) -> None:
    pytest.importorskip("tensorrt_rtx")
    import dataclasses

    hopper = dataclasses.replace(
        module("settings").rehearsal(tmp_path), rehearsal=False, compute_capability="9.0"
    )
    file = hopper.write()
    ended = _run(file, tmp_path / "rtx.result.json", 300, script="part_rtx.py")
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "rtx.result.json").read_text())["result"]
    assert found["listed"] is False and found["runs_as"] == []
    layer_plans = found["ways"]
    assert list(layer_plans) == ["kvexport", "current", "portable", "SM89"]
    assert layer_plans["kvexport"]["messages"][0].startswith("kvexport: ")  # refused, and why
    for way in ("portable", "SM89"):  # TensorRT-RTX builds them here, and there is nothing to load them on
        assert (
            layer_plans[way]["built"] and not layer_plans[way]["loads"] and layer_plans[way]["runs"] is False
        )
        assert any(message.startswith("ERROR") for message in layer_plans[way]["messages"])
        assert layer_plans[way]["runtime_said"]
    bundle = tmp_path / "bundle-1"
    bundle.mkdir()
    ended = _run(file, tmp_path / "engine.result.json", 300, "std24", script="part_engine.py")
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "engine.result.json").read_text())["result"]
    assert "left_out" in found or found["builder"] == "tensorrt"


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder with `work` and `records`, and how the rehearsal ended."""
    pytest.importorskip("tensorrt_rtx")
    folder = tmp_path_factory.mktemp("rehearsal")
    return folder, _run(
        "--rehearse", "--work", folder / "work", "--output", folder / "records", "--deadline", 1200
    )


@pytest.mark.slow
@pytest.mark.tensorrt
def test_a_rehearsal_runs_every_part_and_is_marked_as_one(rehearsed: Any) -> None:
    folder, ended = rehearsed
    assert ended.returncode == 0, ended.stdout + ended.stderr
    records = _records(folder / "records")
    assert len(records) == 9
    for record in records.values():
        assert (
            record["status"] == "ran"
            and record["rehearsal"] is True
            and record["settings"]["rehearsal"] is True
        )
    for name in ("onnxruntime", "onnxruntime-again"):
        lines = records[name]["result"]["bench"]
        assert [line["bundle"] for line in lines] == ["bundle-4", "bundle-1"]
        assert [line["provider"] for line in lines] == ["cpu", "cpu"]
    validation = records["onnxruntime"]["result"]["validation"]
    assert [not each["failures"] for found in validation.values() for each in found] == [True, True]
    decode = records["pytorch"]["result"]["decode"]
    sides = {f"{how}, {heads} KV heads" for how in ("eager", "compiled") for heads in (4, 1)}
    assert {depth: set(figures) for depth, figures in decode.items()} == {"16": sides, "64": sides}
    for lowering, native in (("std24", "KV_CACHE_UPDATE"), ("decomposed17", "SOFTMAX")):
        result = records[f"engine-{lowering}"]["result"]
        assert (
            result["build"]["record"]["layers"][native] and result["runs"] is None and "bench" not in result
        )
    rows = records["memory"]["result"]["rows"]
    assert [row["kv_heads"] for row in rows] == [4, 1] and all(
        row["measured"]["total"] is None for row in rows
    )
    assert rows[0]["predicted"]["kv"] == 4 * rows[1]["predicted"]["kv"] > 0
    assert "**A rehearsal on the CPU" in ended.stdout
    assert (folder / "records" / "summary.md").read_text() == ended.stdout.removesuffix("\n")
    said = ended.stdout + "".join(path.read_text() for path in (folder / "records").glob("*.json"))
    assert str(folder) not in said and str(ROOT) not in said


@pytest.mark.slow
@pytest.mark.tensorrt
def test_pytorch_must_run_the_model_of_the_bundle(rehearsed: Any, tmp_path: Path) -> None:
    folder, _ = rehearsed
    for name in ("checkpoint-4", "checkpoint-1", "bundle-4", "bundle-1"):
        shutil.copytree(folder / "work" / name, tmp_path / "work" / name)
    shutil.copy(folder / "work" / "bundle-4" / "reference.npz", tmp_path / "work" / "bundle-1")
    ended = _run(
        "--rehearse", "--only", "pytorch", "--work", tmp_path / "work", "--output", tmp_path / "records"
    )
    assert ended.returncode == 1
    record = _records(tmp_path / "records")["pytorch"]
    assert (
        record["status"] == "failed"
        and "reference of bundle-1 must be the same model" in record["failures"][0]
    )
    assert (
        record["result"]["same_model"]["4"]["least_cosine_of_logits"]
        > 0.999
        > 0.9
        > (record["result"]["same_model"]["1"]["least_cosine_of_logits"])
    )
