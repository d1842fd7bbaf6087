"""Directories that are written completely or not at all."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvexport.errors import UsageError
from kvexport.files.directory_lock import lock_directory, remove_abandoned


@contextmanager
def atomic_directory(path: Path, *, marker: str, force: bool = False) -> Iterator[Path]:
    """Give a temporary directory, which is renamed to `path` when the block ends without an exception.

    After an exception (including an interrupt and a full disk) nothing is left. What a killed process left is
    removed by the next one that writes to the same path.

    Args:
        path: path of the directory.
        marker: name of a file that identifies the kind of directory.
        force: replace an existing directory that contains `marker`; it stays until the new one is complete.

    Raises:
        UsageError: `path` exists, or its parent does not.
    """
    require_output(path, marker=marker, force=force)
    path = path.resolve()  # replaces what a link points to, not the link
    temporary = path.parent / f".{path.name}.{os.getpid()}.partial"
    replaced = path.parent / f".{path.name}.replaced"
    remove_abandoned(path.parent.glob(glob.escape(f".{path.name}.") + "*.partial"))
    lock = None
    try:
        temporary.mkdir()
        lock = lock_directory(temporary)
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        require_output(path, marker=marker, force=force)  # another process may have created it
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
    """Check that an output directory can be written, before any work is done for it.

    Arguments as `atomic_directory`.

    Raises:
        UsageError: `path` exists, or its parent does not.
    """
    if require_path(path, force=force) and not (path / marker).is_file():
        raise UsageError(
            f"the output {path} must be of the same kind to be replaced: it has no {marker}",
            fix="choose another --output",
        )


def require_path(path: Path, *, force: bool) -> bool:
    """Check that an output path is free, or with `force` may be replaced.

    Returns:
        Whether something is at the path; the caller checks that it is of the kind it replaces.

    Raises:
        UsageError: `path` exists without `force`, or its parent does not.
    """
    if not path.parent.is_dir():
        raise UsageError(
            "the folder for the output must exist", got=path.parent, fix=f"mkdir -p {path.parent}"
        )
    exists = path.exists() or path.is_symlink()
    if exists and not force:
        raise UsageError(
            f"the output {path} must not exist yet", fix="choose another --output, or replace it with --force"
        )
    return exists


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
