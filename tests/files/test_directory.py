"""Directories are written completely or not at all, wherever and however writing is stopped."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import kvexport.files.atomic_directory
from kvexport.errors import UsageError
from kvexport.files.atomic_directory import atomic_directory, require_output

MARKER = "manifest.json"


def write(path: Path, text: str = "new", *, force: bool = False) -> None:
    with atomic_directory(path, marker=MARKER, force=force) as directory:
        (directory / MARKER).write_text(text)
        (directory / "weights").write_text("w" * 100)


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden siblings included."""
    return sorted(entry.name for entry in folder.iterdir())


def test_appears_when_the_block_ends(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out", marker=MARKER) as directory:
        (directory / MARKER).write_text("new")
        assert not (tmp_path / "out").exists()
        assert directory.parent == tmp_path  # on the same file system, so that a rename is enough
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == [MARKER]


def test_has_the_permissions_of_a_new_directory(tmp_path: Path) -> None:
    write(tmp_path / "out")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), KeyboardInterrupt(), SystemExit(1), OSError(errno.ENOSPC, "full")],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize("replacing", [False, True])
def test_exception_leaves_nothing(error: BaseException, replacing: bool, tmp_path: Path) -> None:
    if replacing:
        write(tmp_path / "out", "old")
    with (
        pytest.raises(type(error)),
        atomic_directory(tmp_path / "out", marker=MARKER, force=replacing) as directory,
    ):
        (directory / MARKER).write_text("new")
        (directory / "folder").mkdir()
        raise error
    assert names(tmp_path) == (["out"] if replacing else [])
    if replacing:
        assert (tmp_path / "out" / MARKER).read_text() == "old"


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("replacing", [False, True])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.EIO, "broken disk")], ids=lambda e: type(e).__name__
)
def test_failed_system_call_leaves_the_old_or_the_new_directory(
    call: str,
    nth: int,
    replacing: bool,
    error: BaseException,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every sync and every rename fails once."""
    if replacing:
        write(tmp_path / "out", "old")
    owner, attribute = (os, "fsync") if call == "fsync" else (Path, "rename")
    original: Callable[..., Any] = getattr(owner, attribute)
    count = 0

    def failing(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == nth:
            raise error
        return original(*arguments)

    monkeypatch.setattr(owner, attribute, failing)
    calls = {"fsync": 4, "rename": 2 if replacing else 1}[call]
    if nth > calls:
        write(tmp_path / "out", force=replacing)
        return
    with pytest.raises(type(error)):
        write(tmp_path / "out", force=replacing)
    assert names(tmp_path) == (["out"] if replacing else [])
    if replacing:
        assert (tmp_path / "out" / MARKER).read_text() == "old"


@pytest.mark.parametrize("replacing", [False, True])
def test_interrupt_at_any_line_leaves_the_old_or_the_new_directory(replacing: bool, tmp_path: Path) -> None:
    """Interrupt the directory module at its first executed line, then at its second, and so on."""
    finished = False
    stop = 0
    observed = set()
    while not finished:
        stop += 1
        folder = tmp_path / str(stop)
        folder.mkdir()
        if replacing:
            write(folder / "out", "old")
        finished = not _interrupted(stop, lambda folder=folder: write(folder / "out", force=replacing))
        state = (folder / "out" / MARKER).read_text() if (folder / "out").exists() else None
        observed.add(state)
        assert state in ("new", "old" if replacing else None)
        assert not list(folder.glob(".*.partial"))
        write(folder / "out", "newer", force=True) if state else write(folder / "out", "newer")
        assert names(folder) == ["out"]
    assert stop > 20  # it did interrupt
    assert observed == {"new", "old" if replacing else None}


def _interrupted(stop: int, work: Callable[[], None]) -> bool:
    """Raise KeyboardInterrupt at the `stop`-th line of atomic_directory that `work` executes.

    Returns:
        whether that line was reached.
    """
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename != kvexport.files.atomic_directory.__file__:
            return None
        if event == "line":
            count += 1
            if count == stop:
                raise KeyboardInterrupt
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(previous)
    return False


def test_force_replaces_only_directories_with_the_marker(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(UsageError, match="--force"):
        write(tmp_path / "out")
    write(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / MARKER).read_text() == "new"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    with pytest.raises(UsageError, match=MARKER):
        write(tmp_path / "photos", force=True)
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UsageError):
        write(tmp_path / "file", force=True)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError):
        write(tmp_path / "link", force=True)
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "cat"
    assert names(tmp_path) == ["file", "link", "out", "photos"]


def test_old_directory_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with atomic_directory(tmp_path / "out", marker=MARKER, force=True) as directory:
        (directory / MARKER).write_text("new")
        assert (tmp_path / "out" / MARKER).read_text() == "old"


def test_replaces_the_target_of_a_link(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "latest").symlink_to(tmp_path / "out")
    write(tmp_path / "links" / "latest", force=True)
    assert (tmp_path / "links" / "latest").is_symlink()
    assert (tmp_path / "out" / MARKER).read_text() == "new"
    assert names(tmp_path) == ["links", "out"]
    assert names(tmp_path / "links") == ["latest"]


def test_replaces_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "old")
    monkeypatch.chdir(tmp_path / "out")
    write(Path(), force=True)
    assert (tmp_path / "out" / MARKER).read_text() == "new"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("parent", ["missing", "file"])
def test_error_of_a_missing_parent_names_the_fix(parent: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"mkdir -p"):
        require_output(tmp_path / parent / "out", marker=MARKER, force=False)


_WRITE = """
import sys, time
from pathlib import Path
from kvexport.files.atomic_directory import atomic_directory
with atomic_directory(Path(sys.argv[1]), marker="manifest.json") as directory:
    (directory / "weights").write_text("half of them")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_removes_leftovers_of_killed_processes_only(tmp_path: Path) -> None:
    (tmp_path / ".out.notes").write_text("somebody's file")
    (tmp_path / ".out2.1.partial").mkdir()
    processes = []
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", _WRITE, tmp_path / "out"], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        processes.append((process, process.stdout))
        assert process.stdout.readline() == "writing\n"
    killed, running = (process for process, _ in processes)
    try:
        assert len(list(tmp_path.glob(".out.*.partial"))) == 2
        killed.kill()
        killed.wait()
        assert len(list(tmp_path.glob(".out.*.partial"))) == 2
        write(tmp_path / "out")
        assert names(tmp_path) == sorted(
            [".out.notes", f".out.{running.pid}.partial", ".out2.1.partial", "out"]
        )
    finally:
        for process, stdout in processes:
            process.kill()
            process.wait()
            stdout.close()


def test_patterns_in_names_are_literal(tmp_path: Path) -> None:
    for name in (".out1.7.partial", ".out[1].7.partial"):
        (tmp_path / name).mkdir()
    write(tmp_path / "out[1]")
    assert names(tmp_path) == [".out1.7.partial", "out[1]"]


_FULL = """
import resource, sys
from pathlib import Path
from kvexport.files.atomic_directory import atomic_directory
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
with atomic_directory(Path(sys.argv[1]), marker="manifest.json") as directory:
    (directory / "weights").write_bytes(bytes(1 << 17))
"""


def test_file_size_limit_leaves_nothing(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", _FULL, tmp_path / "out"], capture_output=True, text=True)
    assert f"[Errno {errno.EFBIG}]" in ran.stderr
    assert names(tmp_path) == []
