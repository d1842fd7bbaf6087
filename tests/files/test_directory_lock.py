"""Tests of the locks of directories."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from kvexport.files.directory_lock import lock_directory, remove_abandoned


def test_where_there_are_no_locks_nothing_counts_as_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    directory = tmp_path / "used.partial"
    directory.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)
        lock = lock_directory(directory)
        assert lock is not None  # the directory can be used nevertheless
        os.close(lock)
        remove_abandoned([directory])
        assert directory.exists()
    remove_abandoned([directory])  # control
    assert not directory.exists()


def test_a_shared_lock_excludes_only_an_exclusive_one(tmp_path: Path) -> None:
    first, second = (lock_directory(tmp_path, shared=True) for _ in range(2))
    assert first is not None and second is not None
    assert lock_directory(tmp_path) is None
    for lock in (first, second):
        os.close(lock)
    exclusive = lock_directory(tmp_path)
    assert exclusive is not None  # control
    assert lock_directory(tmp_path, shared=True) is None
    os.close(exclusive)
