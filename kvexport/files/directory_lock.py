"""Locks of directories among processes, which end with the process that holds them."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

_NO_LOCKS = (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)  # of a file system that has none


def lock_directory(path: Path, *, shared: bool = False, required: bool = False) -> int | None:
    """Lock a directory without waiting.

    Args:
        path: the directory; a symbolic link to one counts as missing.
        shared: whether other processes may hold a shared lock at the same time.
        required: whether a directory of a file system without locks counts as locked by others.

    Returns:
        A descriptor that holds the lock until it is closed; None if the directory is missing, or locked by
        others.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        locked = os.path.samestat(os.fstat(descriptor), path.stat())  # it was not replaced meanwhile
    except OSError as error:
        locked = not required and error.errno in _NO_LOCKS
    if locked:
        return descriptor
    os.close(descriptor)
    return None


def remove_abandoned(paths: Iterable[Path]) -> None:
    """Remove directories that killed processes left; a running process holds the lock of its directory."""
    for path in paths:
        lock = lock_directory(path, required=True)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
