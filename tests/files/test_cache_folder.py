"""Tests of the cache folder: complete directories only, locks between readers and writers, the limit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvexport.cli.conversion import build_cache_folder
from kvexport.errors import CannotRunHere
from kvexport.files import cache_folder
from kvexport.files.cache_folder import CacheFolder, default_cache_folder


def put(folder: CacheFolder, key: str, content: bytes, used: float | None = None) -> Path:
    new = folder.create(key)
    (new.path / "file").write_bytes(content)
    new.publish()
    new.close()
    if used is not None:
        os.utime(folder.path / key, (used, used))
    return folder.path / key


def content(folder: CacheFolder) -> dict[str, bytes]:
    return {entry.path.name: (entry.path / "file").read_bytes() for entry in folder.entries()}


def temporary(folder: CacheFolder) -> list[str]:
    return [path.name for path in folder.path.iterdir() if path.name.startswith(".")]


@pytest.fixture
def folder(tmp_path: Path) -> CacheFolder:
    return CacheFolder(tmp_path / "deep" / "cache")


def test_the_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KVEXPORT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / ".cache" / "kvexport"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_folder() == tmp_path / "xdg" / "kvexport"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache_folder() == tmp_path / ".cache" / "kvexport"
    monkeypatch.setenv("KVEXPORT_CACHE", str(tmp_path / "own"))
    assert default_cache_folder() == tmp_path / "own"


def test_a_user_without_home_folder_builds_without_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("KVEXPORT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert build_cache_folder(no_cache=False) is not None  # control
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(CannotRunHere, match="KVEXPORT_CACHE"):
        default_cache_folder()
    assert build_cache_folder(no_cache=False) is None


def test_a_missing_folder_is_empty_and_others_cannot_read_it(folder: CacheFolder) -> None:
    assert folder.entries() == [] and folder.lease("a") is None and folder.clean() == 0
    put(folder, "a", b"1")
    assert folder.path.stat().st_mode & 0o077 == 0


def test_a_directory_appears_when_it_is_published_only(folder: CacheFolder) -> None:
    new = folder.create("a")
    (new.path / "file").write_bytes(b"123")
    assert new.bytes() == 3 and folder.entries() == [] and folder.lease("a") is None
    new.publish()
    new.close()
    assert content(folder) == {"a": b"123"} and not temporary(folder)
    folder.create("a").close()  # not published
    assert content(folder) == {"a": b"123"} and not temporary(folder)


def test_the_last_one_wins_unless_the_directory_is_in_use(folder: CacheFolder) -> None:
    put(folder, "a", b"first")
    put(folder, "a", b"second")
    assert content(folder) == {"a": b"second"}
    lease = folder.lease("a")
    assert lease is not None and not folder.remove("a")
    put(folder, "a", b"third")
    assert content(folder) == {"a": b"second"} and not temporary(folder)
    lease.release()
    put(folder, "a", b"third")
    assert content(folder) == {"a": b"third"}


def test_several_may_read_a_directory(folder: CacheFolder) -> None:
    put(folder, "a", b"1")
    leases = [folder.lease("a"), folder.lease("a")]
    assert all(leases)
    del leases[0]
    assert not folder.remove("a")
    del leases[:]  # a lease that is collected ends
    assert folder.remove("a") and folder.entries() == []


def test_what_killed_processes_left_is_removed_and_what_running_ones_write_is_not(
    folder: CacheFolder,
) -> None:
    script = (
        "import os, sys; from pathlib import Path; from kvexport.files.cache_folder import CacheFolder\n"
        "new = CacheFolder(Path(sys.argv[1])).create('a'); (new.path / 'file').write_text('part')\n"
        "os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", script, str(folder.path)], check=False)
    assert len(temporary(folder)) == 1
    running = folder.create("b")
    assert temporary(folder) == [running.path.name]
    folder.create("c").close()
    assert temporary(folder) == [running.path.name]


def test_the_directories_that_were_not_used_for_long_go_first(
    folder: CacheFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_folder, "_LARGEST", 100)
    for at, key in enumerate("abcd"):
        put(folder, key, bytes(20), used=1000.0 + at)
    folder.lease("a")  # counts as a use
    assert [entry.path.name for entry in folder.entries()] == ["a", "d", "c", "b"]
    assert folder.make_room(20, "e") and len(folder.entries()) == 4
    assert folder.make_room(45, "e") and set(content(folder)) == {"a", "d"}
    held = folder.lease("d")
    assert not folder.make_room(90, "e") and set(content(folder)) == {"d"}
    assert folder.make_room(100, "d")  # the one that it replaces does not count
    del held
    assert not folder.make_room(101, "e")
    assert set(content(folder)) == {"d"}  # nothing goes for what cannot fit


def test_the_limit_is_a_tenth_of_the_free_disk_at_most(
    folder: CacheFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put(folder, "a", bytes(50))
    usage = type("Usage", (), {"free": 950})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert folder.limit() == 100
    usage.free = 10**15
    assert folder.limit() == 20 * 10**9


def test_cleaning_keeps_what_is_in_use(folder: CacheFolder) -> None:
    for key in "ab":
        put(folder, key, bytes(10))
    lease = folder.lease("b")
    assert folder.clean() == 10 and set(content(folder)) == {"b"}
    assert lease is not None
    lease.release()
    assert folder.clean() == 10 and folder.entries() == []
