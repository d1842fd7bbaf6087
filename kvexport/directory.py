"""Directories that appear whole or not at all; knows renames, and nothing of what is inside."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvexport.errors import UsageError


@contextmanager
def atomic_directory(path: Path, *, marker: str, force: bool = False) -> Iterator[Path]:
    """A temporary sibling of `path` to write into, renamed to `path` when the block ends without an exception.

    After an exception (an interrupt and a full disk among them) nothing is left. `force` lets an existing
    directory be replaced, if it holds a file `marker`, by which its kind is known.

    Raises:
        UsageError: `path` exists, or its parent does not.
    """
    require_output(path, marker=marker, force=force)
    temporary = path.parent / f".{path.name}.{os.getpid()}.partial"
    replaced = path.parent / f".{path.name}.{os.getpid()}.replaced"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def require_output(path: Path, *, marker: str, force: bool) -> None:
    """Refuse an output that cannot be written, before any work is done for it.

    Raises:
        UsageError: `path` exists, or its parent does not.
    """
    if not path.parent.is_dir():
        raise UsageError("the folder for the output does not exist", seen=path.parent, fix=f"mkdir -p {path.parent}")
    if not path.exists() and not path.is_symlink():
        return
    if not force:
        raise UsageError(f"the output {path} exists already", fix="choose another --output, or replace it with --force")
    if not (path / marker).is_file():
        raise UsageError(
            f"the output {path} exists and is not what would replace it (it has no {marker})", fix="choose another --output"
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
