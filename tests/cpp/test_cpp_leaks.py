"""Valgrind watches a bundle being opened and closed a hundred times through the C ABI: cpp/tests/leaks.c."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from builds import CPP, build, require
from decoders import make_decoder
from tiny_bundles import write_bundle

pytestmark = pytest.mark.slow

KINDS = "definite,indirect,possible"
FOUND = 99
WATCH = (
    "valgrind", "--leak-check=full", f"--show-leak-kinds={KINDS}", f"--errors-for-leak-kinds={KINDS}",
    f"--error-exitcode={FOUND}", "--num-callers=30", f"--suppressions={CPP / 'tests' / 'valgrind.supp'}",
)  # fmt: skip


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("valgrind"):
        (pytest.fail if os.environ.get("CI") else pytest.skip)("there is no valgrind here (apt-get install valgrind)")
    made, folder = tmp_path_factory.mktemp("leaks") / "leaks", build("release")
    links = (f"-L{folder}", "-lkvexport", f"-Wl,-rpath,{folder}")
    require("cc", "-std=c99", "-g", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{CPP / 'include'}", CPP / "tests" / "leaks.c",
            *links, "-o", made)  # fmt: skip
    return made


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    decoder = make_decoder("llama", dtype=torch.float32)
    return write_bundle(tmp_path_factory.mktemp("bundle") / "b", decoder, self_test=True)


def watched(*command: str | Path | int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*WATCH, *map(str, command)], capture_output=True, text=True)


def test_nothing_leaks_in_a_hundred_times(program: Path, bundle: Path, tmp_path: Path) -> None:
    ran = watched(program, bundle, tmp_path / "cache", 100)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert "ERROR SUMMARY: 0 errors" in ran.stderr


def test_what_is_not_closed_is_found(program: Path, bundle: Path, tmp_path: Path) -> None:
    ran = watched(program, bundle, tmp_path / "cache", 1, "leak")
    assert ran.returncode == FOUND and "kvexport_open" in ran.stderr and "definitely lost" in ran.stderr
