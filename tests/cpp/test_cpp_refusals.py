"""Invalid arguments and files in C++: error messages, and that a failed call changes nothing."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundles import CAPACITY
from drive import Drive, Refused
from support.tiny_bundles import edit_manifest
from test_cpp_parity import data_of, opened, tokens

from kvexport.errors import KvexportError, UsageError

pytestmark = pytest.mark.slow


def parts_of(call: Callable[[], object]) -> dict[str, Any]:
    with pytest.raises(Refused) as refused:
        call()
    return refused.value.parts


@pytest.mark.parametrize("name", ["gqa", "gqa-l2-norm"])
def test_a_failed_call_leaves_the_cache_unchanged(name: str, drive: Drive, bundles: Path) -> None:
    drive.open(bundles / name)
    drive.new(capacity=100)
    drive.new(cache="untouched", capacity=100)
    for cache in ("c", "untouched"):
        drive.generate(tokens(80), cache=cache, max_new_tokens=4, stop_tokens=[])
    for call, failed, got, expected in (
        (lambda: drive.prefill([3, 40]), "token ids must be inside the vocabulary", "40", "0 to 39"),
        (lambda: drive.prefill([-1]), "token ids must be inside the vocabulary", "-1", "0 to 39"),
        (lambda: drive.step(40), "token ids must be inside the vocabulary", "40", "0 to 39"),
        (
            lambda: drive.prefill(tokens(17)),
            "the prompt must fit behind the tokens in the cache",
            "101 tokens",
            "at most 100",
        ),
        (lambda: drive.generate([1], max_new_tokens=0), "max_new_tokens must be at least 1", "0", ""),
        (
            lambda: drive.generate([1], top_p=0.0, temperature=1),
            "top_p must be above 0 and at most 1",
            "0",
            "",
        ),
        (
            lambda: drive.generate([1], stop_texts=["x"]),
            "this session must have a tokenizer for text",
            None,
            "",
        ),
        (
            lambda: drive("turn", cache="c", text="hello"),
            "this session must have a tokenizer for text",
            None,
            "",
        ),
    ):
        parts = parts_of(call)
        assert parts["failed"] == failed and got in (None, parts["got"]) and parts["expected"] == expected
    assert (drive.prefill(tokens(16)) == drive.prefill(tokens(16), cache="untouched")).all()
    parts = parts_of(lambda: drive.step(1))
    assert parts["failed"] == "the token must fit the capacity" and parts["fix"].startswith(
        "make the cache with a capacity of 101"
    )


def test_refuses_an_empty_prompt(drive: Drive, bundles: Path) -> None:
    drive.open(bundles / "gqa")
    drive.new()
    for call in (lambda: drive.prefill([]), lambda: drive.generate([])):
        parts = parts_of(call)
        assert (parts["code"], parts["failed"], parts["fix"]) == (
            2,
            "a prompt must not be empty",
            "give at least one token",
        )


@pytest.mark.parametrize("name", ["gqa", "gqa-window", "gqa-large"])
@pytest.mark.parametrize("capacity", [1, 2, 23, 24, 25, 257])
def test_small_capacities_give_the_same_results(
    capacity: int, name: str, drive: Drive, bundles: Path
) -> None:
    """The logits equal those of a large cache, with memory in proportion to the capacity."""
    drive.open(bundles / name, chunk=8)
    drive.new(cache="large")
    small = drive.new(capacity=capacity)
    assert small["capacity"] == capacity and small["bytes"] == drive("memory", session="s", capacity=capacity)
    assert (drive.prefill(tokens(capacity)) == drive.prefill(tokens(capacity), cache="large")).all()
    assert parts_of(lambda: drive.step(1))["failed"] == "the token must fit the capacity"
    drive("clear", cache="c")
    for token in tokens(capacity):
        drive.step(token)
    assert parts_of(lambda: drive.step(1))["got"] == f"{capacity + 1} tokens"


def test_refuses_capacities_out_of_range(drive: Drive, bundles: Path) -> None:
    drive.open(bundles / "gqa")
    for capacity in (-1, CAPACITY + 1, 2**62):
        parts = parts_of(lambda capacity=capacity: drive.new(capacity=capacity))
        assert (
            parts["code"] == 2
            and parts["got"] == str(capacity)
            and f"must be 1 to {CAPACITY}" in parts["failed"]
        )
    assert drive.new(capacity=CAPACITY)["capacity"] == drive.new()["capacity"] == CAPACITY


@pytest.mark.parametrize(
    ("options", "code", "failed"),
    [
        ({"provider": "tpu"}, 2, "the provider must be auto, cpu, cuda or tensorrt"),
        ({"threads": -1}, 2, "threads must be 0 (one per core) to 1024"),
        ({"threads": 1025}, 2, "threads must be 0 (one per core) to 1024"),
        ({"threads": 1_000_000, "provider": "tensorrt"}, 2, "threads must be 0 (one per core) to 1024"),
        ({"chunk": 0}, 2, "chunk must be at least 1"),
        ({"provider": "cuda"}, 3, 'ONNX Runtime must be built with CUDA for provider "cuda"'),
    ],
)
def test_refuses_options_out_of_range(
    options: dict[str, Any], code: int, failed: str, drive: Drive, bundles: Path
) -> None:
    parts = parts_of(lambda: drive.open(bundles / "gqa", **options))
    assert (parts["code"], parts["failed"]) == (code, failed)


def test_auto_falls_back_to_the_cpu(drive: Drive, bundles: Path) -> None:
    info = drive.open(bundles / "gqa", provider="auto")
    assert info["provider"] == "cpu" and info["engine"].startswith("onnxruntime 1.")
    assert info["text_missing"] and not info["has_text"]


def test_refuses_bfloat16_on_the_cpu(drive: Drive, bundles: Path) -> None:
    parts = parts_of(lambda: drive.open(bundles / "gqa-bfloat16"))
    with pytest.raises(KvexportError) as refused:
        opened(bundles / "gqa-bfloat16")
    assert parts["code"] == 3 and parts["failed"] in str(refused.value) and parts["fix"] in str(refused.value)


@pytest.mark.parametrize("file", ["decoder.onnx.data", "decoder.cpu.onnx", "decoder.onnx", "manifest.json"])
def test_detects_a_changed_byte(file: str, drive: Drive, bundles: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(bundles / "gqa", tmp_path / "b")
    content = bytearray((bundle / file).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / file).write_bytes(content)
    parts = parts_of(lambda: drive.open(bundle))
    assert parts["code"] == 2 and "build the bundle again" in parts["fix"]
    if file != "manifest.json":
        assert parts["failed"].startswith(f"{file} of the bundle")
    if file == "decoder.onnx.data":
        drive.open(bundle, verify=False)


def test_refuses_a_graph_that_differs_from_the_manifest(drive: Drive, bundles: Path, tmp_path: Path) -> None:
    """A bundle with the graph of another one and correct hashes."""
    bundle = shutil.copytree(bundles / "gqa", tmp_path / "b")
    other = bundles / "bloom"

    def take(manifest: dict[str, Any]) -> None:
        theirs = json.loads((other / "manifest.json").read_text())
        for name in ("decoder.onnx", "decoder.cpu.onnx", "decoder.onnx.data"):
            shutil.copy(other / name, bundle / name)
            manifest["files"][name] = theirs["files"][name]

    edit_manifest(bundle, take)
    parts = parts_of(lambda: drive.open(bundle))
    assert (
        parts["code"] == 2 and parts["failed"] == "every input of the bundle's graph must match its manifest"
    )
    assert "past_key_values.0.key" in parts["got"] and "past_key_values.0.key" in parts["expected"]


def test_a_bundle_can_be_moved_while_two_sessions_use_it(drive: Drive, bundles: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(bundles / "gqa", tmp_path / "here")
    for session in ("one", "two"):
        drive.open(bundle, session=session)
    bundle = bundle.rename(tmp_path / "there")
    for session in ("one", "two"):
        drive.new(session=session, cache=session)
        drive.prefill(tokens(300), cache=session)
    drive("close", session="one")  # its cache keeps the weights
    assert (drive.step(3, cache="one") == drive.step(3, cache="two")).all()
    drive.open(bundle, session="one")
    with pytest.raises(Refused, match="must be a bundle"):
        drive.open(tmp_path / "here")


def saved(drive: Drive, bundle: Path, path: Path, count: int = 30) -> Path:
    drive.open(bundle)
    drive.new()
    drive.generate(tokens(count), max_new_tokens=3, stop_tokens=[])
    drive("save", cache="c", file=str(path))
    return path


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Edit a saved cache's header."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data_of(path))
    return path


def with_state(**values: object) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        state = json.loads(header["__metadata__"]["state"])
        header["__metadata__"]["state"] = json.dumps({**state, **values})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header["__metadata__"].update(bundle="0" * 64), "must be of this bundle"),
        (
            lambda header: header["__metadata__"].update(kvexport="cache 2"),
            "its format is not supported",
        ),
        (lambda header: header["__metadata__"].update(sha256="0" * 64), "sha256 differs"),
        (lambda header: header["__metadata__"].update(state="[]"), "state"),
        (lambda header: header["__metadata__"].update(state="{"), "must be JSON"),
        (with_state(filled=[20]), "does not match its state"),
        (with_state(filled=[0]), "filled has an invalid value"),
        (with_state(lengths=[-1]), "lengths[0] has an invalid value"),
        (with_state(lengths=[1 << 60]), "must fit the capacity"),
        (with_state(lengths=[700], seen=[700]), "must fit the capacity"),
        (with_state(lengths=[32, 32], seen=[32, 32]), "must hold one sequence"),
        (with_state(last=[40]), "last[0] has an invalid value"),
        (with_state(pending=[[1, 2]]), "pending"),
        (with_state(pending=[["1"]]), "pending has an invalid value"),
        (with_state(filled=[25]), "filled has an invalid value"),
        (with_state(seen=[33]), "seen has an invalid value"),
        (with_state(filled=None), "filled is missing"),
    ],
)
def test_refuses_damaged_caches(
    change: Callable[[dict[str, Any]], object], message: str, drive: Drive, bundles: Path, tmp_path: Path
) -> None:
    path = changed(saved(drive, bundles / "gqa-l2-norm", tmp_path / "cache"), change)
    parts = parts_of(lambda: drive("load", session="s", cache="d", file=str(path)))
    assert parts["code"] == 2 and message in parts["message"] and parts["fix"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gqa", with_state(more=1), "unknown key"),
        ("gqa", with_state(filled=[3]), "filled has an invalid value"),
        ("gqa", with_state(seen=[32]), "seen has an invalid value"),
        (
            "gqa",
            lambda header: header["past_key_values.0.key"].update(strides=[1, 1, 1, 1]),
            "unknown key",
        ),
        ("gqa-l2-norm", with_state(filled=[25]), "filled has an invalid value"),
        ("gqa-l2-norm", with_state(lengths=[24], seen=[24], filled=[25]), "filled has an invalid value"),
    ],
)
def test_python_and_cpp_refuse_a_changed_header(
    name: str,
    change: Callable[[dict[str, Any]], object],
    message: str,
    drive: Drive,
    bundles: Path,
    tmp_path: Path,
) -> None:
    path = changed(saved(drive, bundles / name, tmp_path / "cache"), change)
    require_both_refuse(path, bundles / name, message, drive)


def test_python_and_cpp_refuse_padding_other_than_spaces(drive: Drive, bundles: Path, tmp_path: Path) -> None:
    path = saved(drive, bundles / "gqa", tmp_path / "cache")
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")

    def write_padded(padding: bytes) -> None:
        header = struct.pack("<Q", length + 8) + content[8 : 8 + length]
        path.write_bytes(header + padding + content[8 + length :])

    for padding in (b"\0" * 8, b"\0 more {"):
        write_padded(padding)
        require_both_refuse(path, bundles / "gqa", "NUL", drive)
    write_padded(b" " * 8)  # accepted
    assert drive("load", session="s", cache="d", file=str(path))["length"] == 32


def require_both_refuse(path: Path, bundle: Path, message: str, drive: Drive) -> None:
    parts = parts_of(lambda: drive("load", session="s", cache="d", file=str(path)))
    assert parts["code"] == 2 and message in parts["message"] and parts["fix"]
    with opened(bundle) as session, pytest.raises(UsageError):
        session.load(path)


def test_refuses_impossible_file_names(drive: Drive, bundles: Path, tmp_path: Path) -> None:
    saved(drive, bundles / "gqa", tmp_path / "cache")
    for file, failed in (
        (".", "must be a file, not a folder"),
        (tmp_path, "must be a file, not a folder"),
        (tmp_path / "no" / "file", "No such file"),
    ):
        parts = parts_of(lambda file=file: drive("save", cache="c", file=str(file)))
        assert parts["code"] == 2 and failed in parts["failed"] and parts["fix"]
        parts = parts_of(lambda file=file: drive("load", session="s", cache="d", file=str(file)))
        assert parts["code"] == 2 and "must be an existing file" in parts["failed"] and parts["fix"]


def test_a_prompt_beyond_the_capacity_gets_a_fix(drive: Drive, bundles: Path) -> None:
    """A larger cache helps only up to the capacity of the bundle."""
    drive.open(bundles / "gqa")
    drive.new(capacity=64)
    assert (
        parts_of(lambda: drive.prefill(tokens(CAPACITY)))["fix"]
        == f"make the cache with a capacity of {CAPACITY} or more"
    )
    parts = parts_of(lambda: drive.prefill(tokens(40_000)))
    assert parts["got"] == "40000 tokens" and parts["fix"].startswith("shorten the text")


def test_refuses_caches_that_do_not_fit_or_do_not_exist(drive: Drive, bundles: Path, tmp_path: Path) -> None:
    path = saved(drive, bundles / "gqa", tmp_path / "cache")
    parts = parts_of(lambda: drive("load", session="s", cache="d", file=str(path), capacity=31))
    assert parts["got"] == "32 tokens" and parts["fix"] == "make the cache with a capacity of 32 or more"
    assert (
        drive("load", session="s", cache="d", file=str(path), capacity=32)["length"] == 32
    )  # beside one that is pending
    content = path.read_bytes()
    for kept in (0, 7, 8, 100, len(content) - 1):
        path.write_bytes(content[:kept])
        assert parts_of(lambda: drive("load", session="s", cache="d", file=str(path)))["code"] == 2
    flipped = bytearray(content)
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    assert "sha256" in parts_of(lambda: drive("load", session="s", cache="d", file=str(path)))["failed"]
    assert parts_of(lambda: drive("load", session="s", cache="d", file=str(tmp_path / "none")))["code"] == 2
    assert parts_of(lambda: drive("save", cache="c", file=str(tmp_path / "no" / "folder")))["code"] in (2, 3)
    with opened(bundles / "gqa") as session:
        session.prefill([tokens(3), tokens(5)], cache=(two := session.new_cache(batch=2)))
        two.save(path)
    assert (
        "must hold one sequence"
        in parts_of(lambda: drive("load", session="s", cache="d", file=str(path)))["failed"]
    )
