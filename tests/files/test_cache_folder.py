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

A, B, C, D, E = (letter * 64 for letter in "abcde")  # keys


def put(folder: CacheFolder, key: str, content: bytes, used: float | None = None) -> Path:
    new = folder.create(key)
    (new.path / "file.json").write_bytes(content)
    new.publish()
    new.close()
    if used is not None:
        os.utime(folder.path / key, (used, used))
    return folder.path / key


def content(folder: CacheFolder) -> dict[str, bytes]:
    return {entry.path.name: (entry.path / "file.json").read_bytes() for entry in folder.entries()}


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
    assert folder.entries() == [] and folder.lease(A) is None and folder.clean() == 0
    put(folder, A, b"1")
    assert folder.path.stat().st_mode & 0o077 == 0


def test_a_directory_appears_when_it_is_published_only(folder: CacheFolder) -> None:
    new = folder.create(A)
    (new.path / "file.json").write_bytes(b"123")
    assert new.bytes() == 3 and folder.entries() == [] and folder.lease(A) is None
    new.publish()
    new.close()
    assert content(folder) == {A: b"123"} and not temporary(folder)
    folder.create(A).close()  # not published
    assert content(folder) == {A: b"123"} and not temporary(folder)


def test_the_last_one_wins_unless_the_directory_is_in_use(folder: CacheFolder) -> None:
    put(folder, A, b"first")
    put(folder, A, b"second")
    assert content(folder) == {A: b"second"}
    lease = folder.lease(A)
    assert lease is not None and not folder.remove(A)
    put(folder, A, b"third")
    assert content(folder) == {A: b"second"} and not temporary(folder)
    lease.release()
    put(folder, A, b"third")
    assert content(folder) == {A: b"third"}


def test_several_may_read_a_directory(folder: CacheFolder) -> None:
    put(folder, A, b"1")
    leases = [folder.lease(A), folder.lease(A)]
    assert all(leases)
    del leases[0]
    assert not folder.remove(A)
    del leases[:]  # a lease that is collected ends
    assert folder.remove(A) and folder.entries() == []


def test_what_killed_processes_left_is_removed_and_what_running_ones_write_is_not(
    folder: CacheFolder,
) -> None:
    script = (
        "import os, sys; from pathlib import Path; from kvexport.files.cache_folder import CacheFolder\n"
        "new = CacheFolder(Path(sys.argv[1])).create('a' * 64); (new.path / 'file.json').write_text('part')\n"
        "os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", script, str(folder.path)], check=False)
    assert len(temporary(folder)) == 1
    running = folder.create(B)
    assert temporary(folder) == [running.path.name]
    folder.create(C).close()
    assert temporary(folder) == [running.path.name]


def test_the_directories_that_were_not_used_for_long_go_first(
    folder: CacheFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_folder, "_LARGEST", 100)
    for at, key in enumerate((A, B, C, D)):
        put(folder, key, bytes(20), used=1000.0 + at)
    folder.lease(A)  # counts as a use
    assert [entry.path.name for entry in folder.entries()] == [A, D, C, B]
    assert folder.make_room(20, E) and len(folder.entries()) == 4
    assert folder.make_room(45, E) and set(content(folder)) == {A, D}
    held = folder.lease(D)
    assert not folder.make_room(90, E) and set(content(folder)) == {D}
    assert folder.make_room(100, D)  # the one that it replaces does not count
    del held
    assert not folder.make_room(101, E)
    assert set(content(folder)) == {D}  # nothing goes for what cannot fit


def test_the_limit_is_a_tenth_of_the_free_disk_at_most(
    folder: CacheFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put(folder, A, bytes(50))
    usage = type("Usage", (), {"free": 950})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert folder.limit() == 100
    usage.free = 10**15
    assert folder.limit() == 20 * 10**9


def test_cleaning_keeps_what_is_in_use(folder: CacheFolder) -> None:
    for key in (A, B):
        put(folder, key, bytes(10))
    lease = folder.lease(B)
    assert folder.clean() == 10 and set(content(folder)) == {B}
    assert lease is not None
    lease.release()
    assert folder.clean() == 10 and folder.entries() == []


def test_other_contents_of_the_folder_are_neither_counted_nor_removed(
    folder: CacheFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("Documents/thesis", "photos", f"{B}/diff", f".{C}.notes.partial.d", f"{D[:-1]}g"):
        (folder.path / name).mkdir(parents=True)
        (folder.path / name / "file.json").write_text("1")
    (folder.path / E).mkdir()
    (folder.path / E / "layer").write_text("1")
    (folder.path / ".photos.partial").mkdir()
    before = {path for path in folder.path.rglob("*") if path.exists()}
    put(folder, A, bytes(10), used=1e9)
    monkeypatch.setattr(cache_folder, "_LARGEST", 20)
    assert [entry.path.name for entry in folder.entries()] == [A]
    assert not any(folder.remove(name) for name in ("photos", "../cache", B, E))
    assert folder.make_room(15, C) and folder.entries() == []  # control: the entry goes
    put(folder, A, bytes(10))
    assert folder.clean() == 10
    assert {path for path in folder.path.rglob("*") if path.exists()} == before


def test_a_link_to_a_directory_is_no_entry(folder: CacheFolder, tmp_path: Path) -> None:
    put(folder, A, b"1")
    (folder.path / A).rename(tmp_path / "real")
    for name in (A, f".{B}.123.partial"):
        (folder.path / name).symlink_to(tmp_path / "real")
    assert folder.entries() == [] and folder.lease(A) is None and not folder.remove(A)
    assert folder.clean() == 0
    assert sorted(path.name for path in folder.path.iterdir()) == [f".{B}.123.partial", A]
    assert (tmp_path / "real" / "file.json").read_bytes() == b"1"


def test_a_folder_whose_path_is_too_long_is_empty() -> None:
    folder = CacheFolder(Path("/".join(3000 * "a")))
    assert folder.clean() == 0 and folder.entries() == []
