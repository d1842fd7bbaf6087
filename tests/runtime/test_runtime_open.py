"""Opening bundles: requirements, rejected bundles, and errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
from support.tiny_bundles import edit_manifest, write_bundle

import kvexport
from kvexport.bundle import Bundle
from kvexport.errors import BundleError, CannotRunHere, UsageError
from kvexport.files.hashing import sha256_of
from kvexport.model.decoder import Decoder
from kvexport.runtime import Session

GRAPH = "decoder.cpu.onnx"  # what runs here


def _flip(file: Path, at: int = -10) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def _copy(bundle: Path, into: Path) -> Path:
    return Path(shutil.copytree(bundle, into))


@pytest.mark.parametrize("name", ["decoder.onnx", "decoder.cpu.onnx", "decoder.onnx.data", "tokenizer.json"])
def test_detects_a_flipped_byte_when_opening(text_bundle: Path, tmp_path: Path, name: str) -> None:
    bundle = _copy(text_bundle, tmp_path / "b")
    _flip(bundle / name)
    with pytest.raises(BundleError, match=f"{name} of the bundle .* its sha256 differs"):
        kvexport.open(bundle)


def test_opens_without_hashing_the_weights(text_bundle: Path, tmp_path: Path) -> None:
    bundle = _copy(text_bundle, tmp_path / "b")
    _flip(bundle / "decoder.onnx.data")
    assert kvexport.open(bundle, verify=False).generate([1], max_new_tokens=1).prompt_tokens == 1
    _flip(bundle / "decoder.onnx")
    with pytest.raises(BundleError, match=r"decoder\.onnx of"):
        kvexport.open(bundle, verify=False)


def test_rejects_bfloat16_on_the_cpu(decoder: Decoder, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", decoder, dtype="bfloat16")
    with pytest.raises(CannotRunHere, match=r"no bfloat16 kernels[\s\S]*--dtype float32"):
        kvexport.open(bundle)


def test_rejects_a_graph_that_contradicts_the_manifest(
    decoder: Decoder, tiny_bundle: Path, tmp_path: Path
) -> None:
    """A manifest with smaller heads than the graph is rejected before a cache is allocated."""
    bundle = _copy(tiny_bundle, tmp_path / "b")

    def narrow(raw: dict[str, object]) -> None:
        raw["layers"][1]["key_head_dim"] = 8  # type: ignore[index]
        for kind in ("inputs", "outputs"):
            for spec in raw["graph"][kind]:  # type: ignore[index]
                if spec["name"].endswith("1.key") or spec["name"].endswith("s.1.key"):
                    spec["shape"][3] = 8

    edit_manifest(bundle, narrow)
    with pytest.raises(BundleError, match=r"past_key_values\.1\.key[\s\S]*12[\s\S]*8"):
        kvexport.open(bundle)


def test_rejects_a_graph_that_onnxruntime_cannot_load(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = _copy(tiny_bundle, tmp_path / "b")
    (bundle / GRAPH).write_bytes(b"no graph at all")
    size, digest = 15, sha256_of(bundle / GRAPH)
    edit_manifest(bundle, lambda raw: raw["files"][GRAPH].update(sha256=digest, bytes=size))
    with pytest.raises(CannotRunHere, match=r"cannot load the graph[\s\S]*inspect --verify"):
        kvexport.open(bundle)


def test_never_reads_weights_outside_the_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    """A graph that refers to a file outside its folder, in a bundle with valid hashes."""
    import onnx

    bundle = _copy(tiny_bundle, tmp_path / "b")
    shutil.copyfile(bundle / "decoder.onnx.data", tmp_path / "elsewhere")
    model = onnx.load(bundle / GRAPH, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../elsewhere"
    (bundle / GRAPH).write_bytes(model.SerializeToString())
    file = bundle / GRAPH
    edit_manifest(
        bundle, lambda raw: raw["files"][GRAPH].update(sha256=sha256_of(file), bytes=file.stat().st_size)
    )
    with pytest.raises(CannotRunHere, match="cannot load the graph"):
        kvexport.open(bundle)


def test_rejects_an_unreadable_tokenizer(text_bundle: Path, tmp_path: Path) -> None:
    bundle = _copy(text_bundle, tmp_path / "b")
    file = bundle / "tokenizer.json"
    file.write_text('{"version": "1.0"}')
    edit_manifest(bundle, lambda raw: raw["files"]["tokenizer.json"].update(sha256=sha256_of(file), bytes=18))
    with pytest.raises(BundleError, match=r"tokenizer\.json of .* must be readable"):
        kvexport.open(bundle)


def test_ignores_truncation_and_padding_of_the_tokenizer(text_bundle: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    bundle = _copy(text_bundle, tmp_path / "b")
    file = bundle / "tokenizer.json"
    backend = Tokenizer.from_file(str(file))
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(file))
    edit_manifest(
        bundle,
        lambda raw: raw["files"]["tokenizer.json"].update(sha256=sha256_of(file), bytes=file.stat().st_size),
    )
    prompt = "Once upon a time there was"
    plain = kvexport.open(text_bundle, threads=1).generate(prompt, max_new_tokens=3)
    assert (
        kvexport.open(bundle, threads=1).generate(prompt, max_new_tokens=3) == plain
        and plain.prompt_tokens > 2
    )


def test_rejects_directories_that_are_not_bundles(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing", Path(__file__)):
        with pytest.raises(BundleError, match="must be a bundle"):
            kvexport.open(path)


_LEAN = """
import json, sys
import kvexport
first = sorted(sys.modules)
session = kvexport.open(sys.argv[1], threads=1)
made = session.generate("Once upon", max_new_tokens=4)
loaded = {name.split(".")[0] for name in sys.modules}
print(json.dumps([[m for m in first if m == "onnxruntime"], sorted(loaded), made.text]))
"""


def test_runtime_needs_numpy_onnxruntime_and_tokenizers_only(text_bundle: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _LEAN, str(text_bundle)], capture_output=True, text=True, check=True
    )
    early, loaded, text = json.loads(ran.stdout)
    assert early == [] and isinstance(text, str)
    assert {"numpy", "onnxruntime", "tokenizers"} <= set(loaded)
    heavy = {
        "torch",
        "transformers",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "safetensors",
        "ml_dtypes",
        "rich",
        "click",
    }
    assert not heavy & set(loaded)


_BLOCKED = """
import sys
sys.modules["onnxruntime"] = None
import kvexport
from kvexport.errors import CannotRunHere
try:
    kvexport.open(sys.argv[1])
except CannotRunHere as error:
    print(error)
"""


def test_reports_that_onnxruntime_is_missing(tiny_bundle: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _BLOCKED, str(tiny_bundle)], capture_output=True, text=True, check=True
    )
    assert "onnxruntime is not installed" in ran.stdout and "kvexport[cpu]" in ran.stdout


def test_session_takes_an_opened_bundle(tiny_bundle: Path) -> None:
    assert Session(Bundle.open(tiny_bundle)).generate([1], max_new_tokens=1).text is None
    with pytest.raises(UsageError, match="threads"):
        Session(Bundle.open(tiny_bundle), threads=-1)


def test_uses_the_requested_number_of_threads(tiny_bundle: Path) -> None:
    session = kvexport.open(tiny_bundle, threads=1)
    runtime: onnxruntime.InferenceSession = session.core.decoder.session
    assert runtime.get_providers() == ["CPUExecutionProvider"]
    assert runtime.get_session_options().intra_op_num_threads == 1
