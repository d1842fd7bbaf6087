"""The C++ library and the Python runtime for aarch64, run in an emulator."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from builds import CPP, ROOT, build, run
from drive import Drive

SET_UP = ROOT / "build" / "aarch64"
_PYTHON_DRIVE = Path(__file__).parent / "python_drive.py"
_SCRIPT = "cpp/tools/fetch_aarch64.sh build/aarch64"


def set_up() -> Path:
    """The output of cpp/tools/fetch_aarch64.sh, brought up to date.

    If it was not made, the test is skipped; in CI it fails.
    """
    if not (SET_UP / "made").is_file():
        _skip_or_fail(f"run {_SCRIPT}")
    made = run("bash", CPP / "tools" / "fetch_aarch64.sh", SET_UP, sys.executable)
    if made.returncode == 3:
        _skip_or_fail(made.stderr)
    assert made.returncode == 0, made.stderr
    return SET_UP


def emulated(runtime: str, processor: str = "cortex-a76") -> Drive:
    """A runtime, "cpp" or "python", on an emulated processor, by QEMU's name."""
    folder = set_up()
    environment = {"QEMU_CPU": processor, "PYTHONDONTWRITEBYTECODE": "1"}
    if runtime == "cpp":
        program = build("aarch64") / "tests" / "kvexport_drive"
        return Drive(folder / "bin" / "run", program, **environment)
    return Drive(folder / "bin" / "python", _PYTHON_DRIVE, **environment, PYTHONPATH=str(ROOT))


def native(runtime: str) -> Drive:
    """A runtime on this machine."""
    if runtime == "cpp":
        return Drive(build("release") / "tests" / "kvexport_drive")
    return Drive(Path(sys.executable), _PYTHON_DRIVE, PYTHONPATH=str(ROOT))


def _skip_or_fail(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(f"programs for aarch64 cannot run in CI: {reason}")
    pytest.skip(f"programs for aarch64 cannot run on this machine: {reason}")
