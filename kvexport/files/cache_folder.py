"""A folder of cached directories: each appears complete or not at all, and the least recently used go first.

Several processes may use the folder at the same time. A directory that is read is locked (`Lease`), so that
it is neither replaced nor removed meanwhile.

The folder may have other contents, which are neither read nor removed: a cached directory is a real directory
whose name is 64 hexadecimal digits and which has nothing but JSON and safetensors files.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvexport.errors import CannotRunHere
from kvexport.files.directory_lock import lock_directory, remove_abandoned

_LARGEST = 20 * 10**9  # most bytes of all directories
_DISK_PARTS = 10  # they have at most one of so many parts of the bytes that are free without them
_TEMPORARY = ".partial"
_KEY = re.compile(r"[0-9a-f]{64}")
_UNFINISHED = re.compile(rf"\.{_KEY.pattern}\.[a-z0-9_]+{re.escape(_TEMPORARY)}")
_FILES = (".json", ".safetensors")


def default_cache_folder() -> Path:
    """`$KVEXPORT_CACHE`, else `kvexport` in `$XDG_CACHE_HOME`, else `~/.cache/kvexport`.

    Raises:
        CannotRunHere: the user has no home folder.
    """
    own, base = os.environ.get("KVEXPORT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).absolute()
    if base and Path(base).is_absolute():  # the XDG base directory specification ignores relative paths
        return Path(base) / "kvexport"
    try:
        return Path.home() / ".cache" / "kvexport"
    except RuntimeError as error:
        raise CannotRunHere(
            "the user must have a home folder for the build cache", fix="set KVEXPORT_CACHE to a folder"
        ) from error


@dataclass(frozen=True)
class CachedDirectory:
    """A complete directory in the cache.

    Attributes:
        path: the directory; its name is the key.
        bytes: size of its files.
        used: time of the last use, seconds since the epoch.
    """

    path: Path
    bytes: int
    used: float


class Lease:
    """A directory that is not replaced or removed until `release` is called, or the object is collected.

    Attributes:
        path: the directory.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        """
        Args:
            path: the directory.
            descriptor: holds its lock.
        """
        self.path = path
        self._close = weakref.finalize(self, os.close, descriptor)

    def release(self) -> None:
        """Give the lock up."""
        self._close()


class NewDirectory:
    """A temporary directory, which `publish` renames; call `close` in any case.

    Attributes:
        path: the directory.
    """

    def __init__(self, folder: CacheFolder, key: str) -> None:
        self._folder, self._target = folder, folder.path / key
        self.path = Path(tempfile.mkdtemp(prefix=f".{key}.", suffix=_TEMPORARY, dir=folder.path))
        self._descriptor = lock_directory(self.path)

    def bytes(self) -> int:
        """Size of the files so far."""
        return sum(file.stat().st_size for file in self.path.iterdir())

    def publish(self) -> None:
        """Make it the directory of its key. A directory of that key that is in use stays instead.

        Raises:
            OSError: it cannot be renamed.
        """
        self._folder.remove(self._target.name)
        try:
            self.path.rename(self._target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise

    def close(self) -> None:
        """Remove the directory, unless it was published."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class CacheFolder:
    """A folder of cached directories by key, which is 64 hexadecimal digits.

    Attributes:
        path: the folder; it is created when the first directory is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> list[CachedDirectory]:
        """All complete directories, the last used first."""
        found = []
        for path in self._paths(_KEY):
            size = _size_of(path)
            if size is not None:
                with suppress(OSError):  # removed meanwhile
                    found.append(CachedDirectory(path, size, path.stat().st_mtime))
        return sorted(found, key=lambda entry: (-entry.used, entry.path.name))

    def limit(self) -> int:
        """Most bytes that the directories may have together: 20 GB, or a tenth of the disk's free bytes.

        Raises:
            OSError: the folder cannot be read.
        """
        used = sum(entry.bytes for entry in self.entries())
        return min(_LARGEST, (shutil.disk_usage(self.path).free + used) // _DISK_PARTS)

    def lease(self, key: str) -> Lease | None:
        """Lock the directory of a key for reading, and count it as used; None: there is none, or it is being
        replaced.
        """
        path = self.path / key
        descriptor = self._lock(key, shared=True)
        if descriptor is None:
            return None
        with suppress(OSError):  # read-only
            os.utime(path)
        return Lease(path, descriptor)

    def create(self, key: str) -> NewDirectory:
        """A temporary directory that may become that of the key.

        Raises:
            OSError: the folder cannot be written.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)  # calibration text is the user's
        self._remove_abandoned()
        return NewDirectory(self, key)

    def make_room(self, needed: int, key: str) -> bool:
        """Remove the directories that were not used for the longest time, until `needed` bytes fit.

        Args:
            needed: bytes of a directory that is being created.
            key: its key; the directory that it will replace is not counted.

        Returns:
            False if it does not fit, because it is too large or others are in use.

        Raises:
            OSError: the folder cannot be read.
        """
        limit = self.limit()
        if needed > limit:
            return False
        others = [entry for entry in self.entries() if entry.path.name != key]
        total = needed + sum(entry.bytes for entry in others)
        for entry in reversed(others):
            if total <= limit:
                break
            if self.remove(entry.path.name):
                total -= entry.bytes
        return total <= limit

    def remove(self, key: str) -> bool:
        """Remove the directory of a key; False if there is none, or it is in use or cannot be removed."""
        path = self.path / key
        descriptor = self._lock(key)
        if descriptor is None:
            return False
        try:
            removed = path.with_name(f".{key}.{os.getpid()}{_TEMPORARY}")
            path.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return True

    def clean(self) -> int:
        """Remove all directories that are not in use; returns the number of bytes that they had."""
        freed = sum(entry.bytes for entry in self.entries() if self.remove(entry.path.name))
        self._remove_abandoned()
        return freed

    def _lock(self, key: str, *, shared: bool = False) -> int | None:
        """A descriptor that holds the lock of a cached directory; None: there is none, or others hold it."""
        path = self.path / key
        descriptor = lock_directory(path, shared=shared) if _KEY.fullmatch(key) else None
        if descriptor is None or _size_of(path) is not None:
            return descriptor
        os.close(descriptor)
        return None

    def _paths(self, name: re.Pattern[str]) -> list[Path]:
        try:
            return [path for path in self.path.iterdir() if name.fullmatch(path.name)]
        except OSError:
            return []

    def _remove_abandoned(self) -> None:
        remove_abandoned(self._paths(_UNFINISHED))


def _size_of(path: Path) -> int | None:
    """Bytes of the files of a cached directory; None: it is something else."""
    try:
        if path.is_symlink():
            return None
        files = [(each.suffix, each.lstat()) for each in path.iterdir()]
    except OSError:
        return None
    if not all(suffix in _FILES and stat.S_ISREG(found.st_mode) for suffix, found in files):
        return None
    return sum(found.st_size for _, found in files)
