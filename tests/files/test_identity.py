"""Tests of the identity of files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvexport.files.hashing import sha256_of
from kvexport.files.identity import FileIdentities


def test_a_file_that_is_written_replaced_removed_or_new_has_changed(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("same", "written", "replaced", "removed", "new", "link")]
    same, written, replaced, removed, new, link = paths
    for path in paths[:4]:
        path.write_text("1")
    link.symlink_to(same)
    known = FileIdentities(paths)
    assert known.changed() == []
    written.write_text("22")
    before = replaced.stat()
    (tmp_path / "other").write_text("1")
    os.utime(tmp_path / "other", ns=(before.st_atime_ns, before.st_mtime_ns))
    (tmp_path / "other").rename(replaced)
    removed.unlink()
    new.write_text("1")
    assert known.changed() == sorted((written, replaced, removed, new))
    link.unlink()
    link.symlink_to(written)
    assert link in known.changed()
    assert FileIdentities().changed([same]) == [same]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        sha256_of(tmp_path / "pipe")
