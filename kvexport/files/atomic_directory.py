"""Directories that appear whole or not at all; knows renames and locks, and nothing of what is inside."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvexport.errors import UsageError


@contextmanager
def atomic_directory(path: Path, *, marker: str, force: bool = False) -> Iterator[Path]:
    """A temporary sibling of `path` to write into, renamed to `path` when the block ends without an exception.

    After an exception (an interrupt and a full disk among them) nothing is left. What a killed process left
    is removed by the next one that writes to the same path. `force` lets an existing directory be replaced,
    if it holds a file `marker`, by which its kind is known; it stays until the new one is complete.

    Raises:
        UsageError: `path` exists, or its parent does not.
    """
    require_output(path, marker=marker, force=force)
    path = path.resolve()  # where a link points to
    temporary = path.parent / f".{path.name}.{os.getpid()}.partial"
    replaced = path.parent / f".{path.name}.replaced"
    _remove_abandoned(path)
    lock = None
    try:
        temporary.mkdir()
        lock = _lock(temporary)
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        require_output(path, marker=marker, force=force)  # another process may have made it in the meantime
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            path.rename(replaced)
        temporary.rename(path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        raise
    finally:
        shutil.rmtree(replaced, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def require_output(path: Path, *, marker: str, force: bool) -> None:
    """Refuse an output that cannot be written, before any work is done for it.

    Raises:
        UsageError: `path` exists, or its parent does not.
    """
    if not path.parent.is_dir():
        raise UsageError(
            "the folder for the output does not exist", got=path.parent, fix=f"mkdir -p {path.parent}"
        )
    if not path.exists() and not path.is_symlink():
        return
    if not force:
        raise UsageError(
            f"the output {path} exists already", fix="choose another --output, or replace it with --force"
        )
    if not (path / marker).is_file():
        raise UsageError(
            f"the output {path} exists and is not what would replace it (it has no {marker})",
            fix="choose another --output",
        )


def _remove_abandoned(path: Path) -> None:
    """Remove what killed processes left beside `path`; a running one holds the lock of what it writes."""
    for partial in path.parent.glob(glob.escape(f".{path.name}.") + "*.partial"):
        lock = _lock(partial)
        if lock is not None:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)


def _lock(directory: Path) -> int | None:
    """A descriptor that holds the directory's lock until it is closed or its process ends; None where it cannot be had."""
    descriptor = None
    try:
        descriptor = os.open(directory, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
