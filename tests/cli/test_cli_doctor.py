"""Tests of `kvexport doctor`: the description of this machine, and the check of a target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command_line import Ended, run_kvexport
from support.simulated_gpus import SimulatedGpu, simulate_gpus

from kvexport import __version__

BOARD = """
title = "A fictitious board"
engine = "tensorrt"
sm = "99.9"
memory_gib = 1
usable = 0.5
bandwidth_gb_s = 1
unified = true
tensorrt = "10.3"
[sources]
sm = "none"
memory_gib = "none"
usable = "none"
bandwidth_gb_s = "none"
tensorrt = "none"
"""


def doctor(*arguments: object) -> Ended:
    """Run `kvexport doctor`: exit code, standard output, standard error."""
    return run_kvexport("doctor", *arguments)


def test_shows_versions_packages_and_working_commands() -> None:
    code, out, err = doctor()
    assert (code, err) == (0, "")
    for text in (__version__, "CPUExecutionProvider", "onnxruntime", "torch", "build", "run"):
        assert text in out
    assert any(line.split() == ["inspect", "works"] for line in out.splitlines())


def test_json_has_the_same_content() -> None:
    raw = json.loads(doctor("--json")[1])
    assert raw["kvexport"] == __version__
    assert "CPUExecutionProvider" in raw["providers"]
    assert raw["machine"]["cpus"] >= 1
    assert raw["target"] is None


def test_shows_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_gpus(monkeypatch, SimulatedGpu("NVIDIA H200", "9.0"), driver="570.1")
    out = doctor()[1]
    assert "NVIDIA H200, SM 9.0" in out
    assert "570.1" in out


def test_the_target_cpu_can_run_bundles() -> None:
    code, out, _ = doctor("--target", "cpu")
    assert code == 0
    assert "a bundle runs on this machine" in out


def test_a_target_that_cannot_be_built_or_run_here_exits_with_3_and_the_reason(tmp_path: Path) -> None:
    (tmp_path / "board.toml").write_text(BOARD)
    code, out, err = doctor("--target", tmp_path / "board.toml")
    assert code == 3
    assert "neither be built nor run" in out
    assert "99.9" in err
    assert "fix:" in err
    code, out, _ = doctor("--target", tmp_path / "board.toml", "--json")
    assert code == 3
    assert json.loads(out)["target"]["reasons"]


def test_an_unknown_target_is_a_usage_error() -> None:
    assert doctor("--target", "toaster")[0] == 2
