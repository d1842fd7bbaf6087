"""`kvexport doctor`: what it prints of this machine, and exit code 3 for a target that can do nothing here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.simulated_gpus import SimulatedGpu, simulate_gpus

from kvexport import __version__
from kvexport.cli import main

Doctor = Callable[..., tuple[object, str, str]]

BOARD = """
title = "A board that nobody has"
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


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """`doctor(*arguments) -> exit code, standard output, standard error`."""
    monkeypatch.setattr("signal.signal", lambda *arguments: None)  # the process's handlers stay pytest's

    def call(*arguments: object) -> tuple[object, str, str]:
        code: object = 0
        try:
            main(["doctor", *map(str, arguments)])
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return call


def test_it_says_what_is_here(doctor: Doctor) -> None:
    code, shown, said = doctor()
    assert (code, said) == (0, "")
    for text in (__version__, "CPUExecutionProvider", "onnxruntime", "torch", "build", "run"):
        assert text in shown
    assert any(line.split() == ["inspect", "works"] for line in shown.splitlines())


def test_json_holds_the_same(doctor: Doctor) -> None:
    raw = json.loads(doctor("--json")[1])
    assert raw["kvexport"] == __version__
    assert "CPUExecutionProvider" in raw["providers"]
    assert raw["machine"]["cpus"] >= 1
    assert raw["target"] is None


def test_shows_the_gpu(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_gpus(monkeypatch, SimulatedGpu("NVIDIA H200", "9.0"), driver="570.1")
    shown = doctor()[1]
    assert "NVIDIA H200, SM 9.0" in shown
    assert "570.1" in shown


def test_the_cpu_can_be_used_here(doctor: Doctor) -> None:
    code, shown, _ = doctor("--target", "cpu")
    assert code == 0
    assert "a bundle runs here" in shown


def test_a_target_that_can_do_nothing_here_exits_with_3_and_says_why(doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "board.toml").write_text(BOARD)
    code, shown, said = doctor("--target", tmp_path / "board.toml")
    assert code == 3
    assert "neither be built nor run" in shown
    assert "99.9" in said
    assert "fix:" in said
    code, shown, _ = doctor("--target", tmp_path / "board.toml", "--json")
    assert code == 3
    assert json.loads(shown)["target"]["reasons"]


def test_an_unknown_target_is_a_usage_error(doctor: Doctor) -> None:
    assert doctor("--target", "toaster")[0] == 2
