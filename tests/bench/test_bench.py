"""Benchmarks: what is timed is what was asked for, two bundles take turns, and the machine's word is taken as it is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_bundles import decoder_with_fewer_heads, write_bundle

from kvexport.bench import Plan, describe, measure, ratios, readings
from kvexport.bench.machine import peak_host_bytes
from kvexport.cli import verbs
from kvexport.errors import UsageError
from kvexport.progress import Progress
from kvexport.runtime import Session, open_bundle


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    decoder = decoder_with_fewer_heads(tiny_checkpoint("llama", num_key_value_heads=4, max_position_embeddings=1024))
    return write_bundle(tmp_path_factory.mktemp("bench") / "tiny", decoder, capacity=600)


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(verbs, ["bench", *map(str, arguments), "--threads", "1", "--quiet"])


def lines(*arguments: object) -> list[dict[str, Any]]:
    result = bench(*arguments, "--json")
    if result.exception is not None:
        raise result.exception
    return [json.loads(line) for line in result.stdout.splitlines()]


class Watched(Session):
    """A session that writes down what is asked of it."""

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


def test_prefill_and_decode_are_measured_apart_at_the_depths_asked_for(bundle: Path) -> None:
    calls: list[tuple[Any, ...]] = []
    (result,) = measure([Watched(bundle, calls)], Plan(16, (0, 40), 4, 3, 0), Progress())
    assert calls[:4] == [("", "prefill", 16)] * 4  # one of them to warm up
    assert calls[4:11] == [("", "step", depth) for depth in range(7)]
    assert calls[11:] == [("", "prefill", 40), *(("", "step", depth) for depth in range(40, 47))]
    assert [(point.depth, point.tokens, len(point.samples_ms)) for point in result.prefill] == [(16, 16, 3)]
    assert [(point.depth, point.tokens, len(point.samples_ms)) for point in result.decode] == [(0, 1, 4), (40, 1, 4)]
    for point in (*result.prefill, *result.decode):
        assert 0 < point.p50_ms <= point.p90_ms <= point.p99_ms <= max(point.samples_ms) + 1e-3
        assert point.tokens_per_second == pytest.approx(1000 * point.tokens / point.p50_ms, rel=1e-3)


def test_two_bundles_take_turns_call_by_call(bundle: Path) -> None:
    calls: list[tuple[Any, ...]] = []
    sessions = [Watched(bundle, calls, name) for name in "ab"]
    results = measure(sessions, Plan(8, (8,), 4, 2, 0), Progress())
    assert [name for name, *_ in calls] == ["a", "b"] * (len(calls) // 2)
    compared = ratios(*results)
    assert [(each["stage"], each["depth"]) for each in compared] == [("prefill", 8), ("decode", 8)]
    one, other = results[0].prefill[0].samples_ms, results[1].prefill[0].samples_ms
    assert min(b / a for a, b in zip(one, other, strict=True)) <= compared[0]["median"]
    assert all(low <= each["median"] <= high for each in compared for low, high in [each["quartiles"]])


def test_kv_bytes_are_those_of_the_deepest_point(bundle: Path) -> None:
    session = open_bundle(bundle, threads=1)
    (result,) = measure([session], Plan(8, (0, 300), 5, 1, 0), Progress())
    assert result.kv_bytes_planned == (300 + 3 + 5) * session.bundle.kv_bytes_per_token
    assert result.kv_bytes_allocated == session.memory().bytes_allocated == 512 * session.bundle.kv_bytes_per_token
    assert result.device is None


def test_by_default_the_usual_depths_that_fit_are_taken(bundle: Path) -> None:
    (line,) = lines(bundle, "-n", 4, "--repetitions", 2)
    assert [point["depth"] for point in line["decode"]] == [0, 512]  # 4096 is beyond 600
    assert [point["tokens"] for point in line["prefill"]] == [512]
    (line,) = lines(bundle, "-n", 100, "--repetitions", 2)
    assert [point["depth"] for point in line["decode"]] == [0]


@pytest.mark.parametrize(("option", "tokens"), [("-d", "0,594"), ("-p", "601")])
def test_more_than_the_capacity_is_refused_before_anything_runs(bundle: Path, option: str, tokens: str) -> None:
    result = bench(bundle, option, tokens, "-n", 4)
    assert isinstance(result.exception, UsageError)
    assert f"{option} asks for more tokens than" in str(result.exception) and "--capacity" in str(result.exception)


@pytest.mark.parametrize("depths", ["", "a", "1,,2", "-1", "1.5"])
def test_depths_that_are_none(bundle: Path, depths: str) -> None:
    assert isinstance(bench(bundle, f"--depth={depths}").exception, UsageError)


def test_a_line_says_what_ran_where_and_how(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "runs.jsonl"
    for _ in range(2):
        (line,) = lines(bundle, "-d", 8, "-n", 4, "-p", 8, "--repetitions", 2, "-o", output)
    assert [json.loads(each)["bundle"] for each in output.read_text().splitlines()] == ["tiny", "tiny"]
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert line["manifest_sha256"] == manifest["manifest_sha256"]
    assert line["provider"] == "cpu" and line["engine"].startswith("onnxruntime ") and line["dtype"] == "float32"
    assert line["settings"] == {"prompt": 8, "steps": 4, "repetitions": 2, "seed": 0} and line["threads"] == 1
    assert line["machine"]["cpus"] >= 1 and line["peak_host_bytes"] > 10_000_000


def test_the_table_shows_the_figures_and_how_two_compare(bundle: Path) -> None:
    result = bench(bundle, "--compare", bundle, "-d", 8, "-n", 4, "-p", 8, "--repetitions", 2)
    assert result.exception is None
    assert len(re.findall(r"^tiny\s+(prefill|decode)", result.stdout, re.MULTILINE)) == 4
    assert re.search(r"decode at 8: tiny takes \d+\.\d\d times as long as tiny \(quartiles", result.stdout)
    assert "allocated" in result.stdout and "peak memory" in result.stdout


def test_without_the_hardware_it_says_so(bundle: Path) -> None:
    result = bench(bundle, "--provider", "tensorrt")
    assert getattr(result.exception, "exit_code", None) == 3


@pytest.fixture
def jetson(tmp_path: Path) -> Path:
    files = {
        "proc/cpuinfo": "processor : 0\nmodel name : ARMv8 Processor rev 1 (v8l)\n",
        "proc/meminfo": "MemTotal:        7620504 kB\nMemFree: 1 kB\n",
        "proc/self/status": "Name: python\nVmHWM:\t  2048 kB\n",
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
        "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
        "var/lib/nvpmodel/status": "pmode:0002\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "48500\n",
        "sys/class/thermal/thermal_zone1/type": "broken\n",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1728000\n",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "schedutil\n",
        "sys/class/devfreq/17000000.gpu/cur_freq": "1020000000\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_a_jetson_tells_board_release_power_mode_clocks_and_temperatures(jetson: Path) -> None:
    described = describe(jetson)
    assert described["board"] == "NVIDIA Jetson Orin Nano Developer Kit"
    assert (described["l4t"], described["power_mode"]) == ("36.4.3", "MAXN_SUPER")
    assert described["memory_bytes"] == 7620504 * 1024 and described["processor"].startswith("ARMv8")
    told = readings(jetson)
    assert told["temperature_c"] == {"cpu-thermal": 48.5}  # the other zone cannot be read
    assert told["clock_mhz"] == {"policy0": 1728.0, "17000000.gpu": 1020.0}
    assert told["cpu_governor"] == "schedutil"
    assert peak_host_bytes(jetson) == 2048 * 1024


def test_a_power_mode_without_a_name_keeps_its_number(jetson: Path) -> None:
    (jetson / "etc/nvpmodel.conf").unlink()
    assert describe(jetson)["power_mode"] == "2"


def test_what_a_machine_does_not_tell_is_left_out(tmp_path: Path) -> None:
    assert describe(tmp_path).keys() == {"architecture", "cpus"}
    assert readings(tmp_path).keys() <= {"gpus"}
    assert peak_host_bytes(tmp_path) is None
