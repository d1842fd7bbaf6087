"""Shared folders are built once, whoever asks for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.shared_folders import SharedFolders

_ASK = """
import sys
from pathlib import Path
from support.shared_folders import SharedFolders
from support.test_shared_folders import write_slowly
print(SharedFolders(Path(sys.argv[1])).get(write_slowly, sys.argv[2]))
"""


def write_slowly(folder: Path, log: str, count: int = 1) -> None:
    """Write some files, and a line to `log` for each call."""
    folder.mkdir()
    for number in range(200 * count):
        (folder / str(number)).write_text("x")
    with Path(log).open("a") as calls:
        calls.write(f"{count}\n")


def fail(folder: Path) -> None:
    folder.mkdir()
    raise OSError("no space")


def test_processes_that_ask_at_once_share_one_folder(tmp_path: Path) -> None:
    log, root = str(tmp_path / "log"), tmp_path / "shared"
    command = [sys.executable, "-c", _ASK, str(root), log]
    tests = Path(__file__).parents[1]
    started = [subprocess.Popen(command, cwd=tests, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    folders = {process.communicate()[0].strip() for process in started}
    assert folders == {str(SharedFolders(root).get(write_slowly, log))}
    assert Path(log).read_text() == "1\n"
    assert len(list(Path(folders.pop()).iterdir())) == 200


def test_other_arguments_give_another_folder(tmp_path: Path) -> None:
    shared, log = SharedFolders(tmp_path / "shared"), str(tmp_path / "log")
    small, large = shared.get(write_slowly, log), shared.get(write_slowly, log, count=2)
    assert (len(list(small.iterdir())), len(list(large.iterdir()))) == (200, 400)
    with pytest.raises(TypeError):
        shared.get(write_slowly, tmp_path)


def test_a_build_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    shared = SharedFolders(tmp_path / "shared")
    for _ in range(2):
        with pytest.raises(OSError, match="no space"):
            shared.get(fail)
