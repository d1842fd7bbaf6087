"""Damage one file of a bundle, and compare the state of a folder before and after."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kvexport

STRANGE = "a bundle, renamed (2) – café 日本"
PROMPT = [1, 2, 3]


def generated(path: Path | str) -> tuple[int, ...]:
    """Twelve greedy tokens after `PROMPT`, by the Python runtime on the CPU."""
    with kvexport.open(path, provider="cpu") as session:
        return again(session)


def again(session: kvexport.Session) -> tuple[int, ...]:
    """Twelve greedy tokens after `PROMPT`, by an open session."""
    return session.generate(PROMPT, max_new_tokens=12, stop=[]).token_ids


def damages(size: int) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Kinds of damage to a file of `size` bytes, by name."""
    for at in sorted({0, 1, size // 3, size // 2, size - 2, size - 1}):
        yield f"byte {at} flipped", lambda file, at=at: _flip(file, at)  # type: ignore[misc]
    yield "missing", lambda file: file.unlink()
    yield "truncated", lambda file: file.write_bytes(file.read_bytes()[:-1])
    yield "empty", lambda file: file.write_bytes(b"")
    yield "grown", lambda file: file.write_bytes(file.read_bytes() + b"\n")
    yield "a folder", lambda file: (file.unlink(), file.mkdir())
    yield "a link to nowhere", lambda file: (file.unlink(), file.symlink_to("nowhere"))


def _flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def damaged(sound: Path, folder: Path) -> Iterator[tuple[Path, str, str]]:
    """Copies of a bundle with one damaged file each: the copy, the name of the file, and a description."""
    for file in sorted(sound.iterdir()):
        for way, damage in damages(file.stat().st_size):
            copy = folder / f"{file.name} {way}"
            shutil.copytree(sound, copy)
            damage(copy / file.name)
            yield copy, file.name, f"{file.name}, {way}"
            shutil.rmtree(copy)


def as_it_is(folder: Path) -> dict[str, tuple[int, int, int, int]]:
    """Size, modification time, inode and mode of a folder and everything in it."""
    stats = {each.name: each.stat() for each in [folder, *folder.rglob("*")]}
    return {name: (stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_mode) for name, stat in stats.items()}


def forbid_writing(folder: Path) -> None:
    """Remove write permission; root can still write."""
    for each in [*folder.rglob("*"), folder]:
        each.chmod(each.stat().st_mode & ~0o222)


def on_a_full_disk(
    *command: str | Path, disk: Path, bundle: Path, lines: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command where `disk` is a full file system of its own that holds a copy of the bundle, `disk/b`.

    The command has no other folder for temporary files or settings, and reads `lines`. Skips if this user
    may not make name spaces.
    """
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode
    ):
        pytest.skip("this user may not mount anything")
    size = sum(file.stat().st_size for file in bundle.iterdir()) + (1 << 20)
    script = f"""
        set -eu
        mount -t tmpfs -o size={size} none "$1"
        cp -r "$2" "$1/b"
        cat /dev/zero > "$1/rest" 2>/dev/null || true
        cd "$1" && shift 2
        TMPDIR=$PWD HOME=$PWD exec "$@"
    """
    words = ["unshare", "-rm", "bash", "-c", script, "bash", disk, bundle, *command]
    return subprocess.run(list(map(str, words)), input=lines, capture_output=True, text=True)


def python(program: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, **options
    )  # type: ignore[call-overload,no-any-return]
