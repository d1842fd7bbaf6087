"""Opens, runs and closes a bundle a hundred times under valgrind: no leaks and no invalid memory accesses."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from builds import CPP, environment, run

pytestmark = pytest.mark.slow
TIMES = 100


def run_valgrind(program: Path, *words: str | Path) -> tuple[int, str]:
    """Valgrind's exit code (9 for an error or a leak) and its output."""
    if shutil.which("valgrind") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "valgrind is missing (apt-get install valgrind)"
        )
    suppressions = f"--suppressions={CPP / 'tests' / 'valgrind.supp'}"
    ran = run(
        "valgrind",
        "--leak-check=full",
        "--errors-for-leak-kinds=definite,indirect,possible",
        "--error-exitcode=9",
        suppressions,
        program,
        *words,
        env=environment(),
    )
    return ran.returncode, ran.stderr


def test_opening_and_closing_leaks_nothing(built: Callable[[str], Path], reader_files: Path) -> None:
    code, output = run_valgrind(
        built("release") / "tests" / "open_and_close", reader_files / "tiny", str(TIMES), ""
    )
    assert code == 0 and "in use at exit: 0 bytes in 0 blocks" in output, output[-4000:]


def test_valgrind_detects_a_leaked_cache(built: Callable[[str], Path], reader_files: Path) -> None:
    code, output = run_valgrind(
        built("release") / "tests" / "open_and_close", reader_files / "tiny", "1", "", "leak"
    )
    assert code == 9 and "definitely lost: 0 bytes" not in output, output[-4000:]
