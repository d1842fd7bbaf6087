"""`kvexport inspect`: what a bundle says of itself, for people and for programs, and whether it is whole."""

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
from support.tiny_bundles import byte_level_tokenizer, decoder_with_fewer_heads, edit_manifest, write_bundle

from kvexport.bundle.bundle import Bundle
from kvexport.cli import main
from kvexport.files.hashing import sha256_of


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers: four heads as trained, and two whose keys are 12 and values 16 wide."""
    decoder = decoder_with_fewer_heads(tiny_checkpoint("llama", num_key_value_heads=4, vocab_size=320))
    return write_bundle(
        tmp_path_factory.mktemp("inspect") / "tiny", decoder, capacity=96, tokenizer=byte_level_tokenizer()
    )


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(bundle, tmp_path / "copied"))


@pytest.fixture
def inspect(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[object, str, str]]:
    """`inspect(*arguments) -> exit code, standard output, standard error`."""
    monkeypatch.setattr("signal.signal", lambda *arguments: None)  # the process's handlers stay pytest's

    def call(*arguments: object) -> tuple[object, str, str]:
        code: object = 0
        try:
            main(["inspect", *map(str, arguments)])
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return call


Inspect = Callable[..., tuple[object, str, str]]


def squeezed(text: str) -> list[str]:
    """Lines with one space where there are several."""
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_tables(inspect: Inspect, bundle: Path) -> None:
    code, out, err = inspect(bundle, "--verify")
    assert (code, err) == (0, "")
    layers, facts = out.split("\n\n")
    assert squeezed(layers) == [
        "layer KV heads width method predicted error measured error residual error",
        "0 4 → 4 8 → 8 none 0.2500 0.5000 0.1250",
        "1 4 → 2 8 → 12/16 online 0.2500 0.5000 0.1250",
    ]
    sha = sha256_of(bundle / "decoder.onnx.data")[:12]
    size = (bundle / "decoder.onnx.data").stat().st_size / 1024
    shown = squeezed(facts)
    assert f"decoder.onnx.data {size:.1f} KiB, sha256 {sha} ok" in shown
    assert "KV cache per token 480 B" in shown  # 4 bytes x (4 x 16 + 2 x 28)
    assert "original 512 B" in shown
    assert "dtype, capacity float32, 96 tokens" in shown
    assert "text no chat template" in shown
    assert " ok " not in inspect(bundle)[1]  # only what was hashed is said to be so


def test_json_is_one_object_with_every_figure(inspect: Inspect, bundle: Path) -> None:
    code, out, err = inspect(bundle, "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert (
        said["verified"] is False and json.loads(inspect(bundle, "--json", "--verify")[1])["verified"] is True
    )
    assert said["path"] == str(bundle)
    assert (said["kv_bytes_per_token"], said["kv_bytes_per_token_original"]) == (480, 512)
    assert said["layers"][1]["num_key_value_heads"] == 2
    assert said["graph"]["capacity"] == said["capacity"] == 96
    assert said["files"]["tokenizer.json"]["sha256"] == sha256_of(bundle / "tokenizer.json")


@pytest.mark.parametrize("name", ["decoder.onnx", "decoder.onnx.data", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.999])
def test_one_flipped_byte_is_found_in_any_file(
    inspect: Inspect, copied: Path, name: str, where: float
) -> None:
    data = bytearray((copied / name).read_bytes())
    at = int(len(data) * where)
    data[at] ^= 1
    (copied / name).write_bytes(data)
    code, out, err = inspect(copied, "--verify")
    if name == "manifest.json" and bytes([data[at], data[at] ^ 1]).isspace():
        pytest.skip("white space between values means nothing")
    assert (code, out) == (2, "")
    assert (name if name != "manifest.json" else "manifest") in err


def test_a_flipped_byte_of_the_weights_needs_verify(inspect: Inspect, copied: Path) -> None:
    """A control: without --verify no file is hashed."""
    data = bytearray((copied / "decoder.onnx.data").read_bytes())
    data[7] ^= 1
    (copied / "decoder.onnx.data").write_bytes(data)
    assert inspect(copied)[0] == 0


@pytest.mark.parametrize("damage", ["missing", "longer", "shorter", "directory"])
def test_a_file_that_is_not_as_it_was_is_found_at_once(inspect: Inspect, copied: Path, damage: str) -> None:
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


def test_chat_template(inspect: Inspect, copied: Path) -> None:
    around: list[str] | None
    for around, said in (
        (["<s>", "</s>"], "text chat template"),
        (None, "text chat template without a system prompt"),
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
        assert said in squeezed(inspect(copied)[1].split("\n\n")[1])


def test_a_bundle_without_a_tokenizer(inspect: Inspect, copied: Path) -> None:
    (copied / "tokenizer.json").unlink()
    edit_manifest(copied, lambda manifest: manifest["files"].pop("tokenizer.json"))
    assert "text token ids only" in squeezed(inspect(copied)[1].split("\n\n")[1])


def test_a_newer_format_names_versions_and_the_remedy(inspect: Inspect, copied: Path) -> None:
    edit_manifest(copied, lambda raw: raw.update(format=3, kvexport="7.0.0"))
    code, out, err = inspect(copied)
    assert (code, out) == (2, "")
    assert (
        "format 3" in err and "7.0.0" in err and "format 2" in err and "pip install --upgrade kvexport" in err
    )


def test_what_is_no_bundle(inspect: Inspect, tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        code, out, err = inspect(path)
        assert (code, out) == (2, "")
        assert f"{path} is no bundle" in err
    checkpoint = tiny_checkpoint("llama")
    assert f"kvexport build {checkpoint}" in inspect(checkpoint)[2]


def test_names_are_shown_as_they_are(inspect: Inspect, bundle: Path, tmp_path: Path) -> None:
    """Square brackets and colons are no markup."""
    copied = Path(shutil.copytree(bundle, tmp_path / "copied"))
    edit_manifest(copied, lambda raw: raw["source"].update(name="[red]tiny[/red] :smile: [1]"))
    assert "[red]tiny[/red] :smile: [1] (llama)" in inspect(copied)[1]


@pytest.mark.parametrize("columns", ["40", "80"])
def test_no_figure_is_cut_off_whatever_the_width(bundle: Path, columns: str) -> None:
    """Without a terminal tables are as wide as they need to be; a narrow terminal breaks what does not fit."""
    command = [sys.executable, "-m", "kvexport", "inspect", str(bundle)]
    for terminal in ({}, {"FORCE_COLOR": "1", "TERM": "dumb"}):
        ran = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "COLUMNS": columns, **terminal}
        )
        assert ran.returncode == 0
        assert "…" not in ran.stdout
        if not terminal:
            assert "1 4 → 2 8 → 12/16 online 0.2500 0.5000 0.1250" in squeezed(ran.stdout)


def test_a_reader_that_has_gone_ends_it_quietly(bundle: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run(
        [sys.executable, "-m", "kvexport", "inspect", bundle], stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (141, b"")


def test_it_says_what_the_library_says(inspect: Inspect, bundle: Path) -> None:
    opened = Bundle.open(bundle)
    said = json.loads(inspect(bundle, "--json")[1])
    assert said["kv_bytes_per_token"] == opened.kv_bytes_per_token
    assert len(said["layers"]) == len(opened.layers)
