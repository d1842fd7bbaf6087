"""Bundles that are moved, renamed, read-only, damaged, opened twice or removed, and full disks.

tests/cpp/test_cpp_handling.py has the same tests in C++.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bundle_handling import (
    PROMPT,
    STRANGE,
    again,
    as_it_is,
    damaged,
    forbid_writing,
    generated,
    on_a_full_disk,
    python,
)
from support.decoders import make_decoder
from support.simulated_device import SimulatedDevice, add_engine, onnxruntime_on, simulated_tensorrt
from support.text_bundles import write_text_bundle
from support.tiny_bundles import write_bundle

import kvexport
from kvexport.errors import BundleError, CannotRunHere, UsageError

Tokens = tuple[int, ...]


@pytest.fixture(scope="module")
def sound(shared_folders: Any) -> Path:
    """A bundle with every kind of file; shared."""
    return Path(shared_folders.get(write_text_bundle, capacity=64))


@pytest.fixture(scope="module")
def tokens(sound: Path) -> Tokens:
    return generated(sound)


@pytest.fixture
def bundle(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "b"))


# Location


def test_runs_when_moved_and_renamed(bundle: Path, tokens: Tokens, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / STRANGE
    moved.parent.mkdir()
    bundle.rename(moved)
    assert generated(moved) == tokens == generated(f"{moved}/")


def test_runs_through_links(bundle: Path, tokens: Tokens, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle)
    assert generated(tmp_path / "link") == tokens
    farm = tmp_path / "farm"  # as stores of models keep them
    farm.mkdir()
    for file in bundle.iterdir():
        (farm / file.name).symlink_to(Path("..") / "b" / file.name)
    assert generated(farm) == tokens


def test_relative_path_survives_a_change_of_directory(
    bundle: Path, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle.parent)
    with kvexport.open("b", provider="cpu") as session:
        (tmp_path / "away").mkdir()
        monkeypatch.chdir(tmp_path / "away")
        cache = session.new_cache()
        assert session.generate(PROMPT, max_new_tokens=12, stop=[], cache=cache).token_ids == tokens
        cache.save("c")
        assert session.load("c").lengths.tolist() == cache.lengths.tolist()
        assert session.turn("hello") and session.encode("hello")


# Read-only bundles and full disks


def test_runs_from_a_read_only_directory(bundle: Path, tokens: Tokens, tmp_path: Path) -> None:
    forbid_writing(bundle)
    before = as_it_is(bundle)
    try:
        with kvexport.open(bundle, provider="cpu") as session:
            cache = session.new_cache()
            assert session.generate(PROMPT, max_new_tokens=12, stop=[], cache=cache).token_ids == tokens
            cache.save(tmp_path / "c")
            session.load(tmp_path / "c")
        ran = subprocess.run(
            [sys.executable, "-m", "kvexport", "self-test", bundle], capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        assert as_it_is(bundle) == before
    finally:
        bundle.chmod(0o755)


_ON_FULL_DISK = """
import sys, kvexport
try:
    open("x", "w").write("x" * 10000)
except OSError:
    print("full")
with kvexport.open("b", provider="cpu") as session:
    cache = session.new_cache()
    print(session.generate([1, 2, 3], max_new_tokens=12, stop=[], cache=cache).token_ids)
    try:
        cache.save("saved")
    except OSError as error:
        print(error.strerror, error.filename)
"""


def test_a_full_disk(bundle: Path, tokens: Tokens, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    program = _ON_FULL_DISK + "import os\nprint(sorted(os.listdir('.')))"
    ran = on_a_full_disk(sys.executable, "-c", program, disk=disk, bundle=bundle)
    assert ran.returncode == 0, ran.stderr
    assert (
        ran.stdout == f"full\n{tokens}\nNo space left on device saved\n['b', 'rest', 'x']\n"
        and not ran.stderr
    )
    command = [
        sys.executable,
        "-m",
        "kvexport",
        "run",
        "b",
        "--provider",
        "cpu",
        "--prompt",
        "hello",
        "--save-cache",
        "saved",
    ]
    other = tmp_path / "other"
    other.mkdir()
    ran = on_a_full_disk(*command, disk=other, bundle=bundle)
    assert (
        ran.returncode == 3
        and "the disk is full\n  got:      No space left on device" in ran.stderr
        and "fix:" in ran.stderr
    )


_WITH_SMALL_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
import kvexport
with kvexport.open(sys.argv[1], provider="cpu") as session:
    cache = session.new_cache()
    print(session.generate([1, 2, 3], max_new_tokens=12, stop=[], cache=cache).token_ids)
    try:
        cache.save(sys.argv[2])
    except OSError as error:
        print(error.strerror, error.filename)
"""


def test_reports_a_full_disk_when_saving(bundle: Path, tokens: Tokens, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    ran = python(_WITH_SMALL_FILES, bundle, tmp_path / "out" / "saved")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"{tokens}\nFile too large {tmp_path / 'out' / 'saved'}\n"
    assert not list((tmp_path / "out").iterdir())


def test_writes_nothing_to_the_home_directory_and_sends_nothing(bundle: Path, tmp_path: Path) -> None:
    """ONNX Runtime stores usage data in the home directory unless it is disabled, or in CI."""
    (tmp_path / "home").mkdir()
    hidden = ("CI", "ORT_", "GITHUB_", "TF_BUILD", "BUILD_", "XDG_", "JENKINS_")
    plain = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    environment = {**plain, "HOME": str(tmp_path / "home"), "PYTHONDONTWRITEBYTECODE": "1"}
    program = "import sys, kvexport\nkvexport.open(sys.argv[1], provider='cpu').generate([1])\n"
    ran = python(program, bundle, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert not list((tmp_path / "home").rglob("*"))


# Damage


def test_rejects_any_damage_and_names_the_file(sound: Path, tmp_path: Path) -> None:
    files = set()
    for copy, name, way in damaged(sound, tmp_path):
        files.add(name)
        with pytest.raises(BundleError, match="manifest" if name == "manifest.json" else name) as caught:
            kvexport.open(copy, provider="cpu")
            pytest.fail(way)
        assert caught.value.fix, way
    assert files >= {
        "manifest.json",
        "decoder.onnx",
        "decoder.onnx.data",
        "decoder.cpu.onnx",
        "tokenizer.json",
        "text.json",
    }
    generated(sound)  # a control


def test_rejects_the_manifest_of_another_bundle(bundle: Path, tmp_path: Path) -> None:
    other = write_text_bundle(tmp_path / "other", capacity=64, seed=1)
    shutil.copy(other / "manifest.json", bundle)
    with pytest.raises(BundleError, match=r"decoder|self_test"):
        kvexport.open(bundle)


def test_ignores_files_that_are_not_in_the_manifest(bundle: Path, tokens: Tokens) -> None:
    (bundle / "notes.txt").write_text("copied on Tuesday")
    (bundle / "engines").mkdir()
    assert generated(bundle) == tokens


@pytest.mark.parametrize("what", ["nothing", "a file", "an empty folder"])
def test_rejects_paths_that_are_not_bundles(what: str, tmp_path: Path) -> None:
    path = tmp_path / "b"
    if what == "a file":
        path.write_text("x")
    if what == "an empty folder":
        path.mkdir()
    with pytest.raises(BundleError, match=r"must be a bundle|must be readable"):
        kvexport.open(path)


# Engines of other machines


def test_rejects_engines_of_other_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimulatedDevice()
    onnxruntime_on(device, monkeypatch)
    monkeypatch.setitem(sys.modules, "tensorrt", simulated_tensorrt(device))
    wrong = {
        "gpu": (
            {"compute_capability": ("8.9",)},
            r"was built for compute capability 8\.9, and Simulated has 8\.7",
        ),
        "version": ({"version": "10.3.0.30"}, r"was built with tensorrt 10\.3\.0\.30, here is 10\.16\.2"),
        "bundle": ({"manifest_sha256": "0" * 64}, "must be built from this bundle"),
    }
    for name, (change, reason) in wrong.items():
        bundle = write_bundle(tmp_path / name, make_decoder("gqa", dtype=torch.float32))
        add_engine(bundle, **change)
        with pytest.raises((CannotRunHere, BundleError), match=reason) as caught:
            kvexport.open(bundle, provider="tensorrt")
        assert caught.value.fix is not None and "kvexport engine" in caught.value.fix
        if name == "bundle":  # a mistake that would else go unseen
            with pytest.raises(BundleError, match=reason):
                kvexport.open(bundle)
        else:
            with kvexport.open(bundle) as session:
                assert session.provider == "cuda"
        with kvexport.open(bundle, provider="cpu") as session:
            assert session.provider == "cpu"


# Opened twice


def test_opens_twice_in_one_process(bundle: Path, tokens: Tokens) -> None:
    actual: list[Tokens] = []
    with kvexport.open(bundle, provider="cpu") as one, kvexport.open(bundle, provider="cpu") as other:
        threads = [
            threading.Thread(target=lambda s=session: actual.extend(again(s) for _ in range(5)))
            for session in (one, other)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert actual == [tokens] * 10


_SEVERAL = """
import sys, kvexport
with kvexport.open(sys.argv[1], provider="cpu", threads=1) as session:
    print("open", flush=True)
    sys.stdin.readline()
    for _ in range(20):
        print(session.generate([1, 2, 3], max_new_tokens=12, stop=[]).token_ids)
"""


def test_opens_in_two_processes(bundle: Path, tokens: Tokens) -> None:
    command = [sys.executable, "-c", _SEVERAL, bundle]
    both = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for process in both:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "open\n"
    for process in both:  # both are open: from here on they generate at the same time
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in both:
        message, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and message == f"{tokens}\n" * 20


# Deleted or replaced while open


def test_session_survives_deletion_of_the_bundle(bundle: Path, tokens: Tokens, tmp_path: Path) -> None:
    with kvexport.open(bundle, provider="cpu") as session:
        cache = session.new_cache()
        shutil.rmtree(bundle)
        assert session.generate(PROMPT, max_new_tokens=12, stop=[], cache=cache).token_ids == tokens
        cache.save(tmp_path / "c")
        assert session.load(tmp_path / "c").lengths.tolist() == cache.lengths.tolist()
    with pytest.raises(BundleError, match="must be a bundle"):
        kvexport.open(bundle)


def test_session_survives_replacement_of_the_bundle(bundle: Path, tokens: Tokens, tmp_path: Path) -> None:
    other = write_text_bundle(tmp_path / "other", capacity=64, seed=1)
    new = generated(other)
    with kvexport.open(bundle, provider="cpu") as session:
        bundle.rename(tmp_path / "old")
        other.rename(bundle)
        assert again(session) == tokens
        cache = session.new_cache()
        session.prefill(PROMPT, cache=cache)
        cache.save(tmp_path / "c")
    with kvexport.open(bundle, provider="cpu") as session:
        assert again(session) == new != tokens
        with pytest.raises(UsageError, match="must be of this bundle"):
            session.load(tmp_path / "c")
