"""Whether files are those that they were: their size, modification time and inode."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from kvexport.errors import KvexportError


def identity_of(path: Path) -> tuple[int, int, int, int]:
    """Device, inode, size in bytes and modification time in nanoseconds of a file.

    Raises:
        OSError: it cannot be reached, or is not a regular file: reading a pipe would wait for its writer.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class FileIdentities:
    """The identities of files at the time when they were added."""

    def __init__(self, paths: Iterable[Path] = ()) -> None:
        """`paths`: files to be added, which need not exist."""
        self._known: dict[Path, tuple[int, ...] | None] = {}
        self.add(paths)

    def add(self, paths: Iterable[Path]) -> None:
        """Add files, which need not exist, before they are read."""
        for path in paths:
            self._known.setdefault(path, _identity(path))

    def changed(self, others: Iterable[Path] = ()) -> list[Path]:
        """Files that are no longer what they were, sorted.

        Args:
            others: files that have changed if they were not added, because they are new.
        """
        paths = {*self._known, *others}
        return sorted(path for path in paths if _identity(path) != self._known.get(path))

    def require_unchanged(self, what: str, error: type[KvexportError], others: Iterable[Path] = ()) -> None:
        """Check that no file has changed.

        Args:
            what: what the files are, for the error.
            error: its class.
            others: as for `changed`.

        Raises:
            KvexportError: a file has changed.
        """
        changed = self.changed(others)
        if changed:
            raise error(
                f"{what} must not change while it is read",
                got=f"{', '.join(path.name for path in changed[:3])} changed",
                fix="run the command again when it is complete",
            )


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        return identity_of(path)
    except (OSError, ValueError):  # ValueError: a name with a null byte
        return None
