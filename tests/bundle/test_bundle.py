"""Bundles are written completely or not at all, and readers reject whatever is not valid."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_bundles import (
    byte_level_tokenizer,
    decoder_with_fewer_heads,
    edit_manifest,
    put,
    write_bundle,
)

from kvexport.bundle import Bundle, new_bundle
from kvexport.bundle.manifest import FORMAT
from kvexport.errors import BundleError, UsageError
from kvexport.graph import GraphContract
from kvexport.model.decoder import Decoder

Raw = dict[str, Any]


@pytest.fixture(scope="module")
def decoder(tiny_checkpoint: Callable[..., Path]) -> Decoder:
    return decoder_with_fewer_heads(tiny_checkpoint("llama", num_key_value_heads=4))


@pytest.fixture(scope="module")
def sound(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(
        tmp_path_factory.mktemp("bundle") / "sound", decoder, tokenizer=byte_level_tokenizer()
    )


@pytest.fixture
def bundle(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sound, tmp_path / "bundle"))


def test_reads_what_was_written(sound: Path, decoder: Decoder) -> None:
    bundle = Bundle.open(str(sound))
    assert (
        bundle.path == sound
        and bundle.dtype == "float32"
        and bundle.capacity == 64
        and bundle.calibration is None
    )
    assert bundle.source.model_type == "llama" and bundle.version == "0.1.0"
    assert (
        bundle.model.vocab_size == 67
        and bundle.model.bos_token_id == 1
        and bundle.model.eos_token_ids == (2,)
        and bundle.model.tie_word_embeddings is False
    )
    assert bundle.digest == json.loads((sound / "manifest.json").read_text())["manifest_sha256"]
    assert [layer.num_key_value_heads for layer in bundle.layers] == [4, 2]
    assert (bundle.layers[1].key_head_dim, bundle.layers[1].value_head_dim) == (12, 16)
    assert bundle.layers[1].predicted_error == 0.25
    assert isinstance(bundle.graph, GraphContract) and bundle.graph.num_layers == 2
    assert set(bundle.files) == {"decoder.onnx", "decoder.onnx.data", "decoder.cpu.onnx", "tokenizer.json"}
    bundle.verify()


def test_kv_bytes_per_token_before_and_after(sound: Path, decoder: Decoder, tmp_path: Path) -> None:
    before, after = 2 * 4 * 2 * 8, 4 * 2 * 8 + 2 * (12 + 16)
    for dtype, size in (("float32", 4), ("float16", 2), ("bfloat16", 2)):
        bundle = Bundle.open(write_bundle(tmp_path / dtype, decoder, dtype=dtype))
        assert (bundle.kv_bytes_per_token_original, bundle.kv_bytes_per_token) == (
            size * before,
            size * after,
        )


def test_same_decoder_gives_the_same_bytes(sound: Path, decoder: Decoder, tmp_path: Path) -> None:
    again = write_bundle(tmp_path / "again", decoder, tokenizer=byte_level_tokenizer())
    for file in sorted(sound.iterdir()):
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


# Writing


@pytest.mark.parametrize(
    "failure",
    [
        KeyboardInterrupt(),
        OSError(errno.ENOSPC, "No space left on device"),
        SystemExit(1),
        RuntimeError("bug"),
    ],
    ids=repr,
)
def test_failed_build_leaves_nothing(tmp_path: Path, failure: BaseException) -> None:
    with pytest.raises(type(failure)), new_bundle(tmp_path / "b") as writer:
        (writer.directory / "decoder.onnx").write_bytes(b"half")
        assert list(tmp_path.iterdir()) == [writer.directory]
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_full_disk_during_hashing_or_syncing_leaves_nothing(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*anything: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for where in ("kvexport.bundle.bundle.sha256_of", "kvexport.files.atomic_directory.os.fsync"):
        with monkeypatch.context() as patched:
            patched.setattr(where, full)
            with pytest.raises(OSError, match="No space left"):
                write_bundle(tmp_path / "b", decoder)
        assert list(tmp_path.iterdir()) == []


_LIMITED = """
import resource, sys
from pathlib import Path
from kvexport.bundle import new_bundle
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
with new_bundle(Path(sys.argv[1])) as writer:
    (writer.directory / "decoder.onnx").write_bytes(bytes(1 << 20))
"""


def test_refused_write_leaves_nothing(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(tmp_path / "b")], capture_output=True, text=True
    )
    assert ran.returncode == 1 and "File too large" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_unsealed_bundle_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError), new_bundle(tmp_path / "b"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_does_not_write_invalid_manifests(decoder: Decoder, tmp_path: Path) -> None:
    for change in (
        lambda raw: raw.pop("dtype"),
        lambda raw: raw.update(capacity=65),
        lambda raw: raw["layers"].pop(),
        lambda raw: raw["layers"][0].update(num_key_value_heads=3),
    ):
        with pytest.raises(BundleError, match="manifest"):
            write_bundle(tmp_path / "b", decoder, change=change)
        assert list(tmp_path.iterdir()) == []


def test_error_of_an_impossible_eviction_has_one_got_line(tmp_path: Path, decoder: Decoder) -> None:
    wrong = {"policy": "oldest", "budget": 8, "protect_first": 0, "protect_recent": 0, "skip_layers": []}
    with pytest.raises(
        BundleError, match="eviction must be possible: --evict must be a known policy"
    ) as refused:
        write_bundle(tmp_path / "b", decoder, change=lambda raw: raw.update(eviction=wrong))
    assert str(refused.value).count("got:") == 1


def test_output_that_exists_is_kept_unless_forced(decoder: Decoder, bundle: Path) -> None:
    before = (bundle / "manifest.json").read_text()
    with pytest.raises(UsageError, match="--force"), new_bundle(bundle):
        pass
    with pytest.raises(KeyboardInterrupt), new_bundle(bundle, force=True):
        raise KeyboardInterrupt
    assert (bundle / "manifest.json").read_text() == before and Bundle.open(bundle).verify() is None
    (bundle / "stray").write_text("of the old one")
    with new_bundle(bundle, force=True) as writer:
        for name in ("decoder.onnx", "decoder.onnx.data"):
            shutil.copyfile(bundle / name, writer.directory / name)
        raw = json.loads(before)
        writer.seal({key: raw[key] for key in raw if key not in ("format", "files", "manifest_sha256")})
    assert sorted(file.name for file in bundle.iterdir()) == [
        "decoder.onnx",
        "decoder.onnx.data",
        "manifest.json",
    ]
    assert [file.name for file in bundle.parent.iterdir()] == ["bundle"]


def test_force_replaces_no_other_directory(tmp_path: Path) -> None:
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter").write_text("one")
    with pytest.raises(UsageError, match=r"no manifest\.json"), new_bundle(other, force=True):
        pass
    assert (other / "chapter").read_text() == "one"


# Reading


@pytest.mark.parametrize("name", ["decoder.onnx", "decoder.onnx.data", "tokenizer.json"])
def test_verify_names_the_file_with_one_flipped_bit(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 4
    (bundle / name).write_bytes(content)
    opened = Bundle.open(bundle)  # its size is right
    with pytest.raises(BundleError, match=f"{name} of the bundle .* must be unchanged"):
        opened.verify()
    opened.verify(other for other in opened.files if other != name)


def test_rejects_every_flipped_bit_of_the_manifest(bundle: Path) -> None:
    """Most give invalid JSON or a wrong type; the digest detects changes of numbers and names."""
    file = bundle / "manifest.json"
    whole = file.read_bytes()
    Bundle.open(bundle)
    random = np.random.default_rng(0)
    actual = 0
    for at in random.choice(len(whole), 400, replace=False):
        spoiled = bytearray(whole)
        spoiled[at] ^= 1 << int(random.integers(8))
        file.write_bytes(spoiled)
        try:
            Bundle.open(bundle)
        except BundleError:
            actual += 1
    assert actual == 400


def test_rejects_a_manifest_without_digest(bundle: Path) -> None:
    raw = json.loads((bundle / "manifest.json").read_text())
    del raw["manifest_sha256"]
    (bundle / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(BundleError, match="its sha256 differs"):
        Bundle.open(bundle)


def test_digest_is_computed_with_its_digits_as_zeros(bundle: Path) -> None:
    """Computed without parsing JSON."""
    content = (bundle / "manifest.json").read_bytes()
    before, actual = content.split(b'"manifest_sha256": "')
    assert actual[64:] == b'"\n}\n'
    zeroed = before + b'"manifest_sha256": "' + b"0" * 64 + actual[64:]
    assert hashlib.sha256(zeroed).hexdigest().encode() == actual[:64]


def test_rejects_a_second_digest(bundle: Path) -> None:
    edit_manifest(bundle, lambda raw: raw["source"].update(manifest_sha256="0" * 64))
    with pytest.raises(BundleError, match="its sha256 differs"):
        Bundle.open(bundle)


def test_rejects_the_same_values_with_other_spacing(bundle: Path) -> None:
    raw = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(BundleError, match="its sha256 differs"):
        Bundle.open(bundle)


@pytest.mark.parametrize("value", [FORMAT + 1, "2", None, 2.0, True])
def test_error_of_another_format_names_the_version_that_wrote_it(bundle: Path, value: object) -> None:
    edit_manifest(bundle, lambda raw: raw.update(format=value, kvexport="7.1.0"))
    with pytest.raises(
        BundleError, match=r"format[\s\S]*7\.1\.0[\s\S]*expected: format 3[\s\S]*update kvexport"
    ):
        Bundle.open(bundle)


@pytest.mark.parametrize("value", [FORMAT - 1, 0])
def test_error_of_an_older_format_says_to_build_again(bundle: Path, value: int) -> None:
    edit_manifest(bundle, lambda raw: raw.update(format=value))
    with pytest.raises(BundleError, match="build the bundle again") as refused:
        Bundle.open(bundle)
    assert "update" not in str(refused.value)


def test_names_a_newer_format_if_nothing_else_can_be_read(bundle: Path) -> None:
    (bundle / "manifest.json").write_text('{"format": 9, "all": "else"}')
    with pytest.raises(BundleError, match="format 9"):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", ["decoder.onnx", "decoder.onnx.data", "tokenizer.json"])
def test_rejects_missing_truncated_and_extended_files(bundle: Path, name: str) -> None:
    whole = (bundle / name).read_bytes()
    for content in (whole[:-1], b"", whole + b"x"):
        (bundle / name).write_bytes(content)
        with pytest.raises(BundleError, match=f"{name} of the bundle .* must have the size"):
            Bundle.open(bundle)
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"must contain {name}"):
        Bundle.open(bundle)
    (bundle / name).mkdir()
    with pytest.raises(BundleError, match=f"must contain {name}"):
        Bundle.open(bundle)


def _paths(raw: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every required key of the manifest."""
    if isinstance(raw, dict):
        optional = {"max_position_embeddings", "bos_token_id", "tie_word_embeddings"}
        optional |= {"calibration", "eviction", "window", "block"}
        inner = [_paths(value, (*path, key)) for key, value in raw.items() if key not in optional]
        return [path, *(each for one in inner for each in one)]
    if isinstance(raw, list) and raw and isinstance(raw[0], dict):
        return [path, *_paths(raw[0], (*path, 0))]
    return [path]


def test_every_key_is_required_and_typed(bundle: Path) -> None:
    whole = (bundle / "manifest.json").read_text()
    # tested elsewhere, not a key, or optional
    exempt = ("format", "manifest_sha256", 0, "tokenizer.json", "decoder.cpu.onnx")
    paths = [path for path in _paths(json.loads(whole)) if path and path[-1] not in exempt]
    assert len(paths) > 40
    for path in paths:
        for spoil in (lambda at, key: at.pop(key), lambda at, key: at.update({key: {"nested": []}})):

            def change(
                raw: Raw, path: tuple[str | int, ...] = path, spoil: Callable[[Any, Any], object] = spoil
            ) -> None:
                at: Any = raw
                for key in path[:-1]:
                    at = at[key]
                spoil(at, path[-1])

            (bundle / "manifest.json").write_text(whole)
            edit_manifest(bundle, change)
            with pytest.raises(BundleError):
                Bundle.open(bundle)
                pytest.fail(f"{path} was not needed")


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "sub/file", "..", ".", "", "a\\b", "a\nb", "manifest.json", "a\0b"]
)
def test_rejects_files_outside_the_bundle(bundle: Path, name: str) -> None:
    (bundle.parent / "secret").write_text("s")
    entry = {"sha256": "0" * 64, "bytes": 1}
    edit_manifest(bundle, lambda raw: raw["files"].update({name: entry}))
    with pytest.raises(BundleError, match="by their plain names"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("dtype", to="int4"), "dtype"),
        (put("dtype", to="float16"), r"graph\.dtype"),
        (put("capacity", to=65), r"graph\.capacity"),
        (put("capacity", to=0), "capacity"),
        (put("capacity", to=True), "capacity"),
        (put("capacity", to=64.0), "capacity"),
        (put("model", "vocab_size", to=68), r"graph\.vocab_size"),
        (put("model", "num_hidden_layers", to=3), "num_hidden_layers layers"),
        (put("model", "eos_token_ids", to=[2, "x"]), "eos_token_ids"),
        (put("model", "tie_word_embeddings", to=1), "tie_word_embeddings"),
        (put("layers", 1, "num_key_value_heads", to=4), r"graph\.inputs"),
        (put("layers", 1, "key_head_dim", to=-12), "key_head_dim"),
        (put("layers", 0, "measured_error", to=float("nan")), "measured_error"),
        (put("graph", "inputs", 0, "name", to="tokens"), r"graph\.inputs"),
        (put("graph", "outputs", to=[]), r"graph\.outputs"),
        (put("graph", "inputs", to=[3]), r"graph\.inputs\[0\] must be a table"),
        (put("graph", "more", to=1), "graph has an unknown key"),
        (put("graph", "variant", to="ort"), r"graph\.variant"),
        (put("source", "name", to="\x1b[31mred"), r"source\.name"),
        (put("files", "decoder.onnx", to=None), "decoder.onnx"),
        (lambda raw: raw["files"].pop("decoder.onnx.data"), r"must list decoder\.onnx\.data"),
    ],
)
def test_rejects_inconsistent_manifests(bundle: Path, change: Callable[[Raw], None], message: str) -> None:
    edit_manifest(bundle, change)
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"\xff\xfe",
        b'{"files": {}}',
        b"[" * 100_000,
        b'{"format": 3' + b"0" * 5000 + b"}",
        b" " * (1 << 24) + b"{}",
    ],
    ids=["empty", "cut off", "list", "number", "not UTF-8", "no format", "deep", "long number", "long"],
)
def test_rejects_files_that_are_not_manifests(bundle: Path, content: bytes) -> None:
    (bundle / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json of the bundle"):
        Bundle.open(bundle)


def test_error_of_a_directory_without_manifest_names_the_fix(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=r"no manifest\.json[\s\S]*make one"):
        Bundle.open(tmp_path)
    checkpoint = tiny_checkpoint("llama")
    with pytest.raises(BundleError, match=f"it is a checkpoint.*kvexport build {checkpoint}"):
        Bundle.open(checkpoint)


_LEAN = """
import sys
from kvexport.bundle import Bundle
Bundle.open(sys.argv[1]).verify()
heavy = {"torch", "onnx", "onnx_ir", "onnxruntime", "transformers"}
print(sorted({name.split(".")[0] for name in sys.modules} & heavy))
"""


def test_reading_needs_no_heavy_package(sound: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _LEAN, str(sound)], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "[]"
