"""A hundred times open, run and closed under valgrind: nothing is left, and nothing is read or written that should not be."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from builds import CPP, environment, run

pytestmark = pytest.mark.slow
TIMES = 100


def left(program: Path, *words: str | Path) -> tuple[int, str]:
    """Valgrind's exit code (9 where it found an error or a leak), and what it said."""
    if shutil.which("valgrind") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "there is no valgrind here (apt-get install valgrind)"
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


def test_a_hundred_open_and_close_leave_nothing(built: Callable[[str], Path], reader_files: Path) -> None:
    code, said = left(built("release") / "tests" / "open_and_close", reader_files / "tiny", str(TIMES), "")
    assert code == 0 and "in use at exit: 0 bytes in 0 blocks" in said, said[-4000:]


def test_a_forgotten_cache_is_found(built: Callable[[str], Path], reader_files: Path) -> None:
    code, said = left(built("release") / "tests" / "open_and_close", reader_files / "tiny", "1", "", "leak")
    assert code == 9 and "definitely lost: 0 bytes" not in said, said[-4000:]
