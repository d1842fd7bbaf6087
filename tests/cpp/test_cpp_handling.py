"""Moved, damaged and replaced bundles in C++, as in tests/bundle/test_handling.py."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from builds import build
from drive import Drive, Refused
from support.bundle_handling import PROMPT, STRANGE, as_it_is, damaged, forbid_writing, on_a_full_disk
from support.bundle_handling import generated as python_generated
from support.simulated_device import add_engine
from support.text_bundles import write_text_bundle

pytestmark = pytest.mark.slow

FULL = {"max_new_tokens": 12, "stop_tokens": []}


@pytest.fixture(scope="module")
def sound(shared_folders: Any) -> Path:
    return Path(shared_folders.get(write_text_bundle, capacity=64))


@pytest.fixture(scope="module")
def tokens(sound: Path) -> list[int]:
    return list(python_generated(sound))


@pytest.fixture
def bundle(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "b"))


def drive() -> Drive:
    return Drive(build("release"))


def again(process: Drive, session: str = "s") -> list[int]:
    process.new(session, f"again {session}")
    made: list[int] = process.generate(PROMPT, f"again {session}", **FULL)["tokens"]
    return made


def generated(path: Path | str) -> list[int]:
    with drive() as process:
        process.open(Path(path))
        return again(process)


def refused(path: Path, code: int = 2, **options: object) -> str:
    """The error message of opening a bundle."""
    with drive() as process, pytest.raises(Refused) as caught:
        process.open(path, **options)
    assert caught.value.parts["code"] == code and caught.value.parts["fix"], caught.value.parts
    return str(caught.value)


# Location


def test_opens_a_moved_bundle(bundle: Path, tokens: list[int], tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / STRANGE
    moved.parent.mkdir()
    bundle.rename(moved)
    assert generated(moved) == tokens


def test_opens_a_bundle_through_links(bundle: Path, tokens: list[int], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle)
    assert generated(tmp_path / "link") == tokens
    farm = tmp_path / "farm"
    farm.mkdir()
    for file in bundle.iterdir():
        (farm / file.name).symlink_to(Path("..") / "b" / file.name)
    assert generated(farm) == tokens


def test_a_relative_path_stays_valid_after_chdir(bundle: Path, tokens: list[int], tmp_path: Path) -> None:
    (tmp_path / "away").mkdir()
    with drive() as process:
        process("chdir", folder=str(bundle.parent))
        process.open(Path("b"))
        process("chdir", folder=str(tmp_path / "away"))
        assert again(process) == tokens
        process("save", cache="again s", file="c")
        assert process("load", session="s", cache="c", file="c")["length"] == len(PROMPT + tokens) - 1
        assert process("self_test", session="s")["verdict"] == "ok"
    assert (tmp_path / "away" / "c").exists()


# Nothing is written to the bundle


def test_opens_a_read_only_bundle(bundle: Path, tokens: list[int], tmp_path: Path) -> None:
    forbid_writing(bundle)
    before = as_it_is(bundle)
    try:
        with drive() as process:
            process.open(bundle)
            assert again(process) == tokens
            process("save", cache="again s", file=str(tmp_path / "c"))
            process("load", session="s", cache="c", file=str(tmp_path / "c"))
            assert process("self_test", session="s")["verdict"] == "ok"
        assert as_it_is(bundle) == before
    finally:
        bundle.chmod(0o755)


def script(bundle: str, file: str) -> str:
    commands = (
        {"do": "open", "bundle": bundle, "session": "s", "provider": "cpu"},
        {"do": "new", "session": "s", "cache": "c"},
        {"do": "generate", "cache": "c", "ids": PROMPT, **FULL},
        {"do": "self_test", "session": "s"},
        {"do": "save", "cache": "c", "file": file},
    )
    return "".join(json.dumps(each) + "\n" for each in commands)


def required(ran: subprocess.CompletedProcess[str], tokens: list[int], reason: str) -> str:
    """Check that only the last command failed, with `reason`; returns the remaining output."""
    assert ran.returncode == 0, ran.stderr
    _, _, made, test, saved, *rest = ran.stdout.splitlines()
    assert json.loads(made)["ok"]["tokens"] == tokens and json.loads(test)["ok"]["verdict"] == "ok"
    error = json.loads(saved)["error"]
    assert (
        error["code"] == 3
        and reason in error["failed"]
        and "saved cannot be written" in error["failed"]
        and error["fix"]
    )
    return " ".join(rest)


def test_saving_to_a_full_disk_fails_cleanly(bundle: Path, tokens: list[int], tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    program = build("release") / "tests" / "kvexport_drive"
    command = ("bash", "-c", '"$0"; ls -A', program)
    ran = on_a_full_disk(*command, disk=tmp_path / "disk", bundle=bundle, lines=script("b", "saved"))
    assert required(ran, tokens, "No space left on device") == "b rest"


def test_saving_beyond_the_file_size_limit_fails_cleanly(
    bundle: Path, tokens: list[int], tmp_path: Path
) -> None:
    """Writing would end the process with SIGXFSZ."""
    (tmp_path / "out").mkdir()
    program, limit = build("release") / "tests" / "kvexport_drive", (1000, 1000)
    ran = subprocess.run(
        [program],
        input=script(str(bundle), str(tmp_path / "out" / "saved")),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    required(ran, tokens, "File too large")
    assert not list((tmp_path / "out").iterdir())


def test_writes_nothing_to_the_home_directory(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    hidden = ("CI", "ORT_", "GITHUB_", "TF_BUILD", "BUILD_", "XDG_", "JENKINS_")
    plain = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    program = build("release") / "kvexport_self_test"
    ran = subprocess.run(
        [program, bundle], capture_output=True, text=True, env={**plain, "HOME": str(tmp_path / "home")}
    )
    assert ran.returncode == 0, ran.stderr
    assert not list((tmp_path / "home").rglob("*"))


# Damage


def test_any_damage_is_reported_with_the_file_name(sound: Path, tmp_path: Path) -> None:
    with drive() as process:
        for copy, name, way in damaged(sound, tmp_path):
            with pytest.raises(Refused) as caught:
                process.open(copy)
                pytest.fail(way)
            parts = caught.value.parts
            assert parts["code"] == 2 and parts["fix"], way
            assert ("manifest" if name == "manifest.json" else name) in parts["failed"], way
        process.open(sound)  # undamaged


def test_refuses_the_manifest_of_another_bundle(bundle: Path, tmp_path: Path) -> None:
    other = write_text_bundle(tmp_path / "other", capacity=64, seed=1)
    shutil.copy(other / "manifest.json", bundle)
    message = refused(bundle)
    assert "decoder" in message or "self_test" in message


def test_ignores_files_that_the_manifest_does_not_list(bundle: Path, tokens: list[int]) -> None:
    (bundle / "notes.txt").write_text("copied on Tuesday")
    (bundle / "engines").mkdir()
    assert generated(bundle) == tokens


def test_refuses_paths_that_are_not_bundles(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name in ("nothing", "file", "empty"):
        assert "must be a bundle" in refused(tmp_path / name)


def test_an_engine_of_another_machine_is_not_used(bundle: Path, tokens: list[int]) -> None:
    """This machine has no GPU; cpp/tests/gpu tests the choice of engines."""
    add_engine(bundle)
    refused(bundle, 3, provider="tensorrt")
    with drive() as process:
        assert process.open(bundle, provider="auto")["provider"] in ("cpu", "cuda")
        assert again(process) == tokens


# Two sessions at the same time


def test_opened_twice_in_one_process(bundle: Path, tokens: list[int]) -> None:
    with drive() as process:
        for session in ("one", "other"):
            process.open(bundle, session)
            process.new(session, session)
        for session in ("one", "other"):
            process.prefill(PROMPT, session)
        for before, after in itertools.pairwise(tokens):
            assert {int(process.step(before, session).argmax()) for session in ("one", "other")} == {after}
        process("close", session="one")
        assert again(process, "other") == tokens


def test_opened_twice_by_two_processes(bundle: Path, tokens: list[int]) -> None:
    with drive() as one, drive() as other, ThreadPoolExecutor(2) as pool:
        for process in (one, other):
            process.open(bundle)
        made = [
            pool.submit(lambda process=process: [again(process) for _ in range(20)])
            for process in (one, other)
        ]
        assert all(each.result() == [tokens] * 20 for each in made)


# Changes while it is open


def test_an_open_bundle_can_be_deleted(bundle: Path, tokens: list[int], tmp_path: Path) -> None:
    with drive() as process:
        process.open(bundle)
        shutil.rmtree(bundle)
        assert again(process) == tokens
        process("save", cache="again s", file=str(tmp_path / "c"))
        process("load", session="s", cache="c", file=str(tmp_path / "c"))
        with pytest.raises(Refused, match=r"self_test\.json cannot be read"):
            process("self_test", session="s")
    assert "must be a bundle" in refused(bundle)


def test_an_open_bundle_can_be_replaced(bundle: Path, tokens: list[int], tmp_path: Path) -> None:
    other = write_text_bundle(tmp_path / "other", capacity=64, seed=1)
    new = generated(other)
    with drive() as process:
        process.open(bundle)
        bundle.rename(tmp_path / "old")
        other.rename(bundle)
        assert again(process) == tokens
        process("save", cache="again s", file=str(tmp_path / "c"))
        process.open(bundle, "new")
        assert again(process, "new") == new != tokens
        assert again(process) == tokens
        with pytest.raises(Refused, match="must be of this bundle"):
            process("load", session="new", cache="c", file=str(tmp_path / "c"))
