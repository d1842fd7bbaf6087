"""`kvexport bench`: what is measured, how two bundles alternate, and what the machine reports."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner, Result
from support.simulated_gpus import SimulatedGpu, simulate_gpus
from support.tiny_bundles import decoder_with_fewer_heads, write_bundle

from kvexport.bench import BenchOptions, describe, measure, ratios, readings
from kvexport.bundle import Bundle
from kvexport.cli import commands
from kvexport.devices.telemetry import peak_host_bytes
from kvexport.errors import UsageError
from kvexport.eviction.config import Eviction
from kvexport.progress import Progress
from kvexport.runtime import DeviceMemory, Memory, Session, open_bundle


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    decoder = decoder_with_fewer_heads(
        tiny_checkpoint("llama", num_key_value_heads=4, max_position_embeddings=1024)
    )
    return write_bundle(tmp_path_factory.mktemp("bench") / "tiny", decoder, capacity=600)


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(commands, ["bench", *map(str, arguments), "--threads", "1", "--quiet"])


def lines(*arguments: object) -> list[dict[str, Any]]:
    result = bench(*arguments, "--json")
    if result.exception is not None:
        raise result.exception
    return [json.loads(line) for line in result.stdout.splitlines()]


class RecordingSession(Session):
    """A session that records its calls."""

    def __init__(self, path: Path, calls: list[tuple[Any, ...]], name: str = "") -> None:
        session = open_bundle(path, threads=1)
        self.__dict__.update(session.__dict__)
        self._calls, self._name = calls, name

    def prefill(self, prompts: Any) -> Any:
        self._calls.append((self._name, "prefill", len(prompts)))
        return super().prefill(prompts)

    def step(self, token_ids: Any, active: Any = None) -> Any:
        self._calls.append((self._name, "step", int(self.lengths[0])))
        return super().step(token_ids, active)


def test_measures_prefill_and_decode_separately_at_the_given_depths(bundle: Path) -> None:
    calls: list[tuple[Any, ...]] = []
    (result,) = measure([RecordingSession(bundle, calls)], BenchOptions(16, (0, 40), 4, 3, 0), Progress())
    assert calls[:4] == [("", "prefill", 16)] * 4  # one of them to warm up
    assert calls[4:11] == [("", "step", depth) for depth in range(7)]
    assert calls[11:] == [("", "prefill", 40), *(("", "step", depth) for depth in range(40, 47))]
    assert [(point.depth, point.tokens, len(point.samples_ms)) for point in result.prefill] == [(16, 16, 3)]
    assert [(point.depth, point.tokens, len(point.samples_ms)) for point in result.decode] == [
        (0, 1, 4),
        (40, 1, 4),
    ]
    for point in (*result.prefill, *result.decode):
        assert 0 < point.p50_ms <= point.p90_ms <= point.p99_ms <= max(point.samples_ms) + 1e-3
        assert point.tokens_per_second == pytest.approx(1000 * point.tokens / point.p50_ms, rel=1e-3)


def test_two_bundles_alternate_call_by_call(bundle: Path) -> None:
    calls: list[tuple[Any, ...]] = []
    sessions = [RecordingSession(bundle, calls, name) for name in "ab"]
    results = measure(sessions, BenchOptions(8, (8,), 4, 2, 0), Progress())
    assert [name for name, *_ in calls] == ["a", "b"] * (len(calls) // 2)
    compared = ratios(*results)
    assert [(each["stage"], each["depth"]) for each in compared] == [("prefill", 8), ("decode", 8)]
    one, other = results[0].prefill[0].samples_ms, results[1].prefill[0].samples_ms
    assert min(b / a for a, b in zip(one, other, strict=True)) <= compared[0]["median"]
    assert all(low <= each["median"] <= high for each in compared for low, high in [each["quartiles"]])


class Clock:
    """A clock of a process whose threads keep running for `busy` seconds after each call."""

    def __init__(self, busy: float) -> None:
        self.now, self.worked, self.busy, self.until = 0.0, 0.0, busy, 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.worked

    def sleep(self, seconds: float) -> None:
        self.worked += max(0.0, min(seconds, self.until - self.now))
        self.now += seconds

    def run(self, *_: object) -> None:
        self.now += 0.03
        self.until = self.now + self.busy


@pytest.mark.parametrize(("busy", "waits"), [(0.0, 0.01), (0.027, 0.04), (9.0, 2.0)])
def test_a_call_starts_when_the_threads_of_the_other_session_are_idle(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, busy: float, waits: float
) -> None:
    def intervals(sessions: int) -> list[float]:
        clock, starts = Clock(busy), []
        monkeypatch.setattr(sys.modules[BenchOptions.__module__], "time", clock)
        for call in ("prefill", "step"):
            monkeypatch.setattr(Session, call, lambda *_: (starts.append(clock.now), clock.run()))
        clock.run()
        measure(
            [open_bundle(bundle, threads=1) for _ in range(sessions)],
            BenchOptions(8, (0,), 2, 1, 0),
            Progress(),
        )
        return [later - earlier for earlier, later in pairwise(starts)]

    assert intervals(2) == pytest.approx([0.03 + waits] * (2 * 7 - 1))
    assert intervals(1) == pytest.approx([0.03] * 6)  # a single session does not wait


def test_kv_bytes_are_of_the_deepest_point(bundle: Path) -> None:
    session = open_bundle(bundle, threads=1)
    (result,) = measure([session], BenchOptions(8, (0, 300), 5, 1, 0), Progress())
    assert result.kv_bytes_planned == (300 + 3 + 5) * session.bundle.kv_bytes_per_token
    assert (
        result.kv_bytes_allocated
        == session.memory().bytes_allocated
        == 512 * session.bundle.kv_bytes_per_token
    )
    assert result.device is None and result.peak_device_bytes is None


def test_depths_may_exceed_the_budget_of_a_bundle_that_evicts(
    bundle: Path, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    decoder = decoder_with_fewer_heads(
        tiny_checkpoint("llama", num_key_value_heads=4, max_position_embeddings=1024)
    )
    evicting = write_bundle(
        tmp_path / "b", decoder, capacity=600, eviction=Eviction("window", 32, protect_first=4)
    )
    arguments = ("-d", "8,500", "-n", 4, "-p", 64, "--repetitions", 2)
    evicted, (full,) = lines(evicting, *arguments)[0], lines(bundle, *arguments)
    assert [point["depth"] for point in evicted["decode"]] == [8, 500]
    assert evicted["kv_budget"] == 32 and full["kv_budget"] is None
    assert evicted["kv_bytes_planned"] == evicted["kv_bytes_allocated"] == Bundle.open(evicting).kv_bytes(507)
    assert evicted["kv_bytes_planned"] < full["kv_bytes_planned"] / 10
    output = bench(evicting, *arguments).stdout
    assert re.search(
        r"b: KV budget 32 tokens in each KV head \(window; never the first 4\)",
        " ".join(output.split()),
    )
    assert "KV budget" not in bench(bundle, *arguments).stdout
    with pytest.raises(UsageError, match="at most 600 in total"):
        lines(evicting, "-d", 598)


def test_sorts_depths_and_removes_duplicates(bundle: Path) -> None:
    (line,) = lines(bundle, "-d", "40,0,40", "-n", 4, "-p", 8, "--repetitions", 2)
    assert [point["depth"] for point in line["decode"]] == [0, 40]
    assert line["kv_bytes_planned"] == (40 + 3 + 4) * open_bundle(bundle, threads=1).bundle.kv_bytes_per_token


class SessionOnDevice(RecordingSession):
    """A session on a device whose free memory changes with each reading."""

    free: ClassVar[list[int]] = [700, 400, 900, 900]

    def memory(self) -> Memory:
        device = DeviceMemory("a device", self.free.pop(0), 1000, 100, None, None, 50)
        return dataclasses.replace(super().memory(), device=device)


def test_peak_device_bytes_is_the_largest_reading(bundle: Path) -> None:
    (result,) = measure([SessionOnDevice(bundle, [])], BenchOptions(8, (0, 8), 2, 2, 0), Progress())
    assert result.peak_device_bytes == 600
    assert result.device is not None and result.device["free"] == 900


def test_default_depths_are_those_that_fit(bundle: Path) -> None:
    (line,) = lines(bundle, "-n", 4, "--repetitions", 2)
    assert [point["depth"] for point in line["decode"]] == [0, 512]  # 4096 exceeds the capacity of 600
    assert [point["tokens"] for point in line["prefill"]] == [512]
    (line,) = lines(bundle, "-n", 100, "--repetitions", 2)
    assert [point["depth"] for point in line["decode"]] == [0]


@pytest.mark.parametrize(
    ("option", "tokens", "steps", "smaller"),
    [("-d", "0,594", 4, "-d or -n"), ("-p", "601", 4, "-p"), ("-d", "0", 598, "-d or -n")],
)
def test_rejects_more_tokens_than_the_capacity_before_measuring(
    bundle: Path, option: str, tokens: str, steps: int, smaller: str
) -> None:
    result = bench(bundle, option, tokens, "-n", steps)
    assert f"choose a smaller {smaller}, or" in str(result.exception)
    assert isinstance(result.exception, UsageError)
    assert f"{option} must fit the capacity" in str(result.exception) and "--capacity" in str(
        result.exception
    )


def test_rejects_a_negative_seed(bundle: Path) -> None:
    assert bench(bundle, "-d", 8, "--seed", -5).exit_code == 2


@pytest.mark.parametrize("depths", ["", "a", "1,,2", "-1", "1.5"])
def test_rejects_invalid_depths(bundle: Path, depths: str) -> None:
    assert isinstance(bench(bundle, f"--depth={depths}").exception, UsageError)


def test_a_json_line_describes_bundle_engine_settings_and_machine(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "runs.jsonl"
    for _ in range(2):
        (line,) = lines(bundle, "-d", 8, "-n", 4, "-p", 8, "--repetitions", 2, "-o", output)
    assert [json.loads(each)["bundle"] for each in output.read_text().splitlines()] == ["tiny", "tiny"]
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert line["manifest_sha256"] == manifest["manifest_sha256"]
    assert (
        line["provider"] == "cpu" and line["engine"].startswith("onnxruntime ") and line["dtype"] == "float32"
    )
    settings = {"prompt": 8, "depths": [8], "steps": 4, "repetitions": 2, "seed": 0}
    assert line["settings"] == {**settings, "uncounted": {"prefill": 1, "decode": 3}} and line["threads"] == 1
    assert datetime.fromisoformat(line["started"]).tzinfo is not None
    assert line["machine"]["cpus"] >= 1 and line["peak_host_bytes"] > 10_000_000


def test_rejects_an_output_in_a_missing_folder_before_measuring(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "prefill", lambda *_: pytest.fail("it ran"))
    result = bench(bundle, "-d", 8, "-n", 4, "-p", 8, "-o", tmp_path / "none" / "runs.jsonl")
    assert isinstance(result.exception, UsageError) and "mkdir -p" in str(result.exception)


def test_rejects_an_empty_output_name_before_measuring(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "prefill", lambda *_: pytest.fail("it ran"))
    result = bench(bundle, "-d", 8, "-n", 4, "-p", 8, "-o", "")
    assert isinstance(result.exception, UsageError) and "must be a file" in str(result.exception)


def test_an_interrupted_run_writes_nothing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "step", interrupted)
    assert bench(bundle, "-d", 8, "-n", 4, "-p", 8, "-o", tmp_path / "runs.jsonl").exception is not None
    assert list(tmp_path.iterdir()) == []


def test_prints_the_results_even_if_the_output_cannot_be_written(bundle: Path) -> None:
    result = bench(bundle, "-d", 8, "-n", 4, "-p", 8, "--repetitions", 2, "-o", "/dev/full", "--json")
    assert isinstance(result.exception, OSError) and json.loads(result.stdout)["decode"]


def test_plan_compares_with_the_measurements_in_the_bundle(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    (copy / "bench").mkdir()
    lines(copy, "-d", 8, "-n", 4, "-p", 16, "--repetitions", 2, "-o", copy / "bench/here.json")
    shown = CliRunner().invoke(commands, ["plan", str(copy), "--target", "cpu"]).stdout
    assert re.search(r"^here\.json\s+decode, 8 tokens", shown, re.MULTILINE)


def test_the_table_shows_the_times_and_the_ratio_of_two_bundles(bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    result = bench(bundle, "--compare", other, "-d", 8, "-n", 4, "-p", 8, "--repetitions", 2)
    assert result.exception is None
    assert re.findall(r"^(tiny|other)\s+(?:prefill|decode)", result.stdout, re.MULTILINE) == [
        "tiny",
        "tiny",
        "other",
        "other",
    ]
    assert re.search(r"decode at 8: other takes \d+\.\d\d times as long as tiny \(quartiles", result.stdout)
    assert "allocated" in result.stdout and "peak host memory" in result.stdout
    assert "warm-up of 1 prefill and 3 steps at each depth" in result.stdout


def test_two_bundles_of_the_same_name_are_shown_by_their_paths(bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "tiny"
    shutil.copytree(bundle, other)
    result = bench(bundle, "--compare", other, "-d", 8, "-n", 4, "-p", 8, "--repetitions", 2)
    assert f"decode at 8: {other} takes" in result.stdout


def test_the_table_shows_sensor_readings(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sensors = {
        "temperature_c": {"cpu-thermal": 48.5},
        "clock_mhz": {"17000000.gpu": 1020.0},
        "cpu_governor": {},
        "gpus": [{"name": "a GPU", "power_w": 12.5, "sm_clock_mhz": None}],
    }
    monkeypatch.setattr("kvexport.bench.readings", lambda: sensors)
    result = bench(bundle, "-d", 8, "-n", 4, "-p", 8, "--repetitions", 2)
    assert "cpu-thermal 48 °C; 17000000.gpu 1,020 MHz" in result.stdout
    assert "a GPU, power_w 12.5\n" in result.stdout


def test_exits_with_3_without_the_hardware(bundle: Path) -> None:
    result = bench(bundle, "--provider", "tensorrt")
    assert getattr(result.exception, "exit_code", None) == 3


@pytest.fixture
def jetson(tmp_path: Path) -> Path:
    files = {
        "proc/cpuinfo": "processor : 0\nmodel name : ARMv8 Processor rev 1 (v8l)\n",
        "proc/meminfo": "MemTotal:        7620504 kB\nMemFree: 1 kB\n",
        "proc/self/status": "Name: python\nVmHWM:\t  2048 kB\n",
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: "
        "aarch64\n",
        "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=2 "
        "NAME=MAXN_SUPER >\n",
        "var/lib/nvpmodel/status": "pmode:0002\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "48500\n",
        "sys/class/thermal/thermal_zone1/type": "broken\n",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1728000\n",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "schedutil\n",
        "sys/devices/system/cpu/cpufreq/policy4/scaling_governor": "performance\n",
        "sys/class/devfreq/17000000.gpu/cur_freq": "1020000000\n",
        "sys/kernel/debug/bpmp/debug/clk/emc/rate": "2133000000\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_reads_board_release_power_mode_clocks_and_temperatures_of_a_jetson(jetson: Path) -> None:
    described = describe(jetson)
    assert described["board"] == "NVIDIA Jetson Orin Nano Developer Kit"
    assert (described["l4t"], described["power_mode"]) == ("36.4.3", "MAXN_SUPER")
    assert described["memory_bytes"] == 7620504 * 1024 and described["processor"].startswith("ARMv8")
    sensors = readings(jetson)
    assert sensors["temperature_c"] == {"cpu-thermal": 48.5}  # the other zone has no temperature
    assert sensors["clock_mhz"] == {"policy0": 1728.0, "17000000.gpu": 1020.0, "emc": 2133.0}
    assert sensors["cpu_governor"] == {"policy0": "schedutil", "policy4": "performance"}
    assert peak_host_bytes(jetson) == 2048 * 1024


def test_a_power_mode_without_a_name_is_shown_by_its_number(jetson: Path) -> None:
    (jetson / "etc/nvpmodel.conf").unlink()
    assert describe(jetson)["power_mode"] == "2"


def test_what_a_machine_does_not_report_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_gpus(monkeypatch)
    described = describe(tmp_path)
    assert {name for name, value in described.items() if value is not None} == {"architecture", "cpus"}
    assert {"processor", "memory_bytes", "board", "l4t", "power_mode"} < described.keys()
    assert readings(tmp_path) == {"temperature_c": {}, "clock_mhz": {}, "cpu_governor": {}, "gpus": []}
    assert peak_host_bytes(tmp_path) is None


def test_readings_hold_what_each_gpu_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU that reports everything, and one, as a Jetson's, that reports its name alone."""
    simulate_gpus(
        monkeypatch,
        SimulatedGpu(
            "a desktop's",
            sm_clock_mhz=2520,
            memory_clock_mhz=10501,
            temperature_c=61,
            power_mw=215500,
            power_limit_mw=450000,
        ),
        SimulatedGpu("a Jetson's"),
    )
    desktop, jetson = readings(tmp_path)["gpus"]
    assert desktop == {
        "name": "a desktop's",
        "sm_clock_mhz": 2520,
        "memory_clock_mhz": 10501,
        "temperature_c": 61,
        "power_w": 215.5,
        "power_limit_w": 450.0,
    }
    assert jetson == {**dict.fromkeys(desktop), "name": "a Jetson's"}


@pytest.mark.parametrize("failing", ["nvmlInit_v2", "nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2"])
def test_readings_hold_no_gpu_if_nvml_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    simulate_gpus(monkeypatch, SimulatedGpu(), failing=[failing])
    assert readings(tmp_path)["gpus"] == []
