"""Tests of `kvexport inspect`: its tables, its JSON object, and the detection of damaged bundles."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command_line import Ended, run_kvexport
from support.tiny_bundles import byte_level_tokenizer, decoder_with_fewer_heads, edit_manifest, write_bundle

from kvexport.bundle import Bundle
from kvexport.files.hashing import sha256_of


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of two layers: four original heads, and two heads with keys 12 and values 16 wide."""
    decoder = decoder_with_fewer_heads(tiny_checkpoint("llama", num_key_value_heads=4, vocab_size=320))
    return write_bundle(
        tmp_path_factory.mktemp("inspect") / "tiny", decoder, capacity=96, tokenizer=byte_level_tokenizer()
    )


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may damage."""
    return Path(shutil.copytree(bundle, tmp_path / "copied"))


def inspect(*arguments: object) -> Ended:
    """Run `kvexport inspect`: exit code, standard output, standard error."""
    return run_kvexport("inspect", *arguments)


def normalized(text: str) -> list[str]:
    """The lines of a text, with runs of spaces replaced by one."""
    return [" ".join(line.split()) for line in text.splitlines()]


def test_prints_the_layers_the_sizes_and_the_files(bundle: Path) -> None:
    code, out, err = inspect(bundle, "--verify")
    assert (code, err) == (0, "")
    layers, facts = out.split("\n\n")
    assert normalized(layers) == [
        "layer KV heads head dim method predicted error measured error residual error",
        "0 4 → 4 8 → 8 none 0.2500 0.5000 0.1250",
        "1 4 → 2 8 → 12/16 online 0.2500 0.5000 0.1250",
    ]
    sha = sha256_of(bundle / "decoder.onnx.data")[:12]
    size = (bundle / "decoder.onnx.data").stat().st_size / 1024
    lines = normalized(facts)
    assert f"decoder.onnx.data {size:.1f} KiB, sha256 {sha} ok" in lines
    assert "KV cache per token 480 B" in lines  # 4 bytes x (4 x 16 + 2 x 28)
    assert "original 512 B" in lines
    assert "dtype float32" in lines and "capacity 96 tokens" in lines
    assert "text tokenizer, no chat template" in lines
    assert " ok " not in inspect(bundle)[1]  # files are "ok" only if they were hashed


def test_json_contains_the_manifest_and_the_sizes(bundle: Path) -> None:
    code, out, err = inspect(bundle, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert (
        report["verified"] is False
        and json.loads(inspect(bundle, "--json", "--verify")[1])["verified"] is True
    )
    assert report["path"] == str(bundle)
    assert (report["kv_bytes_per_token"], report["kv_bytes_per_token_original"]) == (480, 512)
    assert report["layers"][1]["num_key_value_heads"] == 2
    assert report["graph"]["capacity"] == report["capacity"] == 96
    assert report["files"]["tokenizer.json"]["sha256"] == sha256_of(bundle / "tokenizer.json")


@pytest.mark.parametrize("name", ["decoder.onnx", "decoder.onnx.data", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.999])
def test_verify_detects_one_flipped_bit_in_any_file(copied: Path, name: str, where: float) -> None:
    data = bytearray((copied / name).read_bytes())
    at = int(len(data) * where)
    data[at] ^= 1
    (copied / name).write_bytes(data)
    code, out, err = inspect(copied, "--verify")
    if name == "manifest.json" and bytes([data[at], data[at] ^ 1]).isspace():
        pytest.skip("white space between JSON values is ignored")
    assert (code, out) == (2, "")
    assert (name if name != "manifest.json" else "manifest") in err


def test_a_flipped_bit_of_the_weights_is_detected_only_with_verify(copied: Path) -> None:
    """Control for the test above: without --verify no file is hashed."""
    data = bytearray((copied / "decoder.onnx.data").read_bytes())
    data[7] ^= 1
    (copied / "decoder.onnx.data").write_bytes(data)
    assert inspect(copied)[0] == 0


@pytest.mark.parametrize("damage", ["missing", "longer", "shorter", "directory"])
def test_detects_a_missing_file_and_a_wrong_size_without_verify(copied: Path, damage: str) -> None:
    file = copied / "decoder.onnx.data"
    data = file.read_bytes()
    file.unlink()
    if damage == "directory":
        file.mkdir()
    elif damage != "missing":
        file.write_bytes(data + b"x" if damage == "longer" else data[:-1])
    code, out, err = inspect(copied)
    assert (code, out) == (2, "")
    assert "decoder.onnx.data" in err
    if damage in ("longer", "shorter"):
        assert f"expected: {len(data)} bytes" in err


def test_shows_whether_there_is_a_chat_template(copied: Path) -> None:
    around: list[str] | None
    for around, line in (
        (["<s>", "</s>"], "text tokenizer, chat template"),
        (None, "text tokenizer, chat template without a system prompt"),
    ):
        chat = {
            "begin": "<",
            "begin_system": around,
            "generate": ">",
            "answer": "",
            "next": ";",
            "strips": False,
        }
        golden = [{"text": "a", "ids": [1], "plain_ids": [1], "decoded": "a"}]
        raw = {"format": 1, "golden": golden, "special_ids": [], "chat": chat, "chat_golden": []}
        (copied / "text.json").write_text(json.dumps(raw))
        entry = {"sha256": sha256_of(copied / "text.json"), "bytes": (copied / "text.json").stat().st_size}

        def add(manifest: dict[str, Any], entry: dict[str, object] = entry) -> None:
            manifest["files"]["text.json"] = entry

        edit_manifest(copied, add)
        assert line in normalized(inspect(copied)[1].split("\n\n")[1])


def test_shows_that_there_is_no_tokenizer(copied: Path) -> None:
    (copied / "tokenizer.json").unlink()
    edit_manifest(copied, lambda manifest: manifest["files"].pop("tokenizer.json"))
    assert "text no tokenizer: token ids only" in normalized(inspect(copied)[1].split("\n\n")[1])


def test_a_newer_format_is_rejected_with_both_versions_and_the_upgrade_command(copied: Path) -> None:
    edit_manifest(copied, lambda raw: raw.update(format=4, kvexport="7.0.0"))
    code, out, err = inspect(copied)
    assert (code, out) == (2, "")
    assert (
        "format 4" in err and "7.0.0" in err and "format 3" in err and "pip install --upgrade kvexport" in err
    )


def test_rejects_a_path_that_is_not_a_bundle(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        code, out, err = inspect(path)
        assert (code, out) == (2, "")
        assert f"{path} must be a bundle" in err
    checkpoint = tiny_checkpoint("llama")
    assert f"kvexport build {checkpoint}" in inspect(checkpoint)[2]


def test_names_are_printed_unchanged(bundle: Path, tmp_path: Path) -> None:
    """Square brackets and colons are not treated as markup."""
    copied = Path(shutil.copytree(bundle, tmp_path / "copied"))
    edit_manifest(copied, lambda raw: raw["source"].update(name="[red]tiny[/red] :smile: [1]"))
    assert "[red]tiny[/red] :smile: [1] (llama)" in inspect(copied)[1]


@pytest.mark.parametrize("columns", ["40", "80"])
def test_no_value_is_truncated_at_any_width(bundle: Path, columns: str) -> None:
    """Without a terminal, tables are as wide as they need to be; in a narrow terminal, cells wrap."""
    command = [sys.executable, "-m", "kvexport", "inspect", str(bundle)]
    for terminal in ({}, {"FORCE_COLOR": "1", "TERM": "dumb"}):
        ran = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "COLUMNS": columns, **terminal}
        )
        assert ran.returncode == 0
        assert "…" not in ran.stdout
        if not terminal:
            assert "1 4 → 2 8 → 12/16 online 0.2500 0.5000 0.1250" in normalized(ran.stdout)


def test_exits_with_141_and_no_message_if_standard_output_is_closed(bundle: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run(
        [sys.executable, "-m", "kvexport", "inspect", bundle], stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (141, b"")


def test_json_agrees_with_the_library(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    report = json.loads(inspect(bundle, "--json")[1])
    assert report["kv_bytes_per_token"] == opened.kv_bytes_per_token
    assert len(report["layers"]) == len(opened.layers)
