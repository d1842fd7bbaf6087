"""What `kvexport.open` needs, refuses and says."""

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
from kvexport.bundle.bundle import Bundle
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
def test_one_flipped_byte_is_found_before_anything_is_generated(
    text_bundle: Path, tmp_path: Path, name: str
) -> None:
    bundle = _copy(text_bundle, tmp_path / "b")
    _flip(bundle / name)
    with pytest.raises(BundleError, match=f"{name} of the bundle .* its sha256 differs"):
        kvexport.open(bundle)


def test_weights_need_not_be_hashed(text_bundle: Path, tmp_path: Path) -> None:
    bundle = _copy(text_bundle, tmp_path / "b")
    _flip(bundle / "decoder.onnx.data")
    assert kvexport.open(bundle, verify=False).generate([1], max_new_tokens=1).prompt_tokens == 1
    _flip(bundle / "decoder.onnx")
    with pytest.raises(BundleError, match=r"decoder\.onnx of"):
        kvexport.open(bundle, verify=False)


def test_bfloat16_cannot_run_here(decoder: Decoder, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", decoder, dtype="bfloat16")
    with pytest.raises(CannotRunHere, match=r"no bfloat16 kernels[\s\S]*--dtype float32"):
        kvexport.open(bundle)


def test_graph_that_is_not_the_manifests(decoder: Decoder, tiny_bundle: Path, tmp_path: Path) -> None:
    """A manifest that promises smaller heads than the graph has: refused before a cache is allocated."""
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


def test_graph_that_onnxruntime_cannot_load(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = _copy(tiny_bundle, tmp_path / "b")
    (bundle / GRAPH).write_bytes(b"no graph at all")
    size, digest = 15, sha256_of(bundle / GRAPH)
    edit_manifest(bundle, lambda raw: raw["files"][GRAPH].update(sha256=digest, bytes=size))
    with pytest.raises(CannotRunHere, match=r"cannot load the graph[\s\S]*inspect --verify"):
        kvexport.open(bundle)


def test_weights_outside_the_bundle_are_never_read(tiny_bundle: Path, tmp_path: Path) -> None:
    """A graph that names a file beyond its folder, in a bundle whose hashes are all right."""
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


def test_tokenizer_that_cannot_be_read(text_bundle: Path, tmp_path: Path) -> None:
    bundle = _copy(text_bundle, tmp_path / "b")
    file = bundle / "tokenizer.json"
    file.write_text('{"version": "1.0"}')
    edit_manifest(bundle, lambda raw: raw["files"]["tokenizer.json"].update(sha256=sha256_of(file), bytes=18))
    with pytest.raises(BundleError, match=r"tokenizer\.json of .* must be readable"):
        kvexport.open(bundle)


def test_truncation_and_padding_of_the_training_run_are_ignored(text_bundle: Path, tmp_path: Path) -> None:
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


def test_what_is_no_bundle(tmp_path: Path) -> None:
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


def test_runtime_needs_nothing_but_numpy_onnxruntime_and_tokenizers(text_bundle: Path) -> None:
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


def test_missing_onnxruntime_is_named(tiny_bundle: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _BLOCKED, str(tiny_bundle)], capture_output=True, text=True, check=True
    )
    assert "onnxruntime is not installed" in ran.stdout and "kvexport[cpu]" in ran.stdout


def test_session_takes_an_opened_bundle(tiny_bundle: Path) -> None:
    assert Session(Bundle.open(tiny_bundle)).generate([1], max_new_tokens=1).text is None
    with pytest.raises(UsageError, match="threads"):
        Session(Bundle.open(tiny_bundle), threads=-1)


def test_session_runs_on_the_cpu_with_the_threads_asked_for(tiny_bundle: Path) -> None:
    session = kvexport.open(tiny_bundle, threads=1)
    runtime: onnxruntime.InferenceSession = session.core.decoder._session
    assert runtime.get_providers() == ["CPUExecutionProvider"]
    assert runtime.get_session_options().intra_op_num_threads == 1
