"""Tests of `kvexport engine`: its output, its errors and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.command_line import Ended, run_kvexport
from support.decoders import make_decoder
from support.tiny_bundles import write_bundle

from kvexport.devices.gpu import find_gpu

without_gpu = pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    decoder = make_decoder(kv_heads=2, head_dim=16, dtype=torch.float32)
    return write_bundle(tmp_path / "bundle", decoder, dtype="float16", capacity=64)


def engine(*arguments: object) -> Ended:
    """Run `kvexport engine`: exit code, standard output, standard error."""
    return run_kvexport("engine", *arguments)


@pytest.mark.slow
@pytest.mark.tensorrt
def test_table_and_json_show_the_same_record(bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    code, out, err = engine(
        bundle, "--compute-capability", "8.6", "--compute-capability", "8.9", "--chunk", 8
    )
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    assert "compute capability 8.6, 8.9" in text and "std24, float16" in text
    assert "4 in-place cache updates, 2 attentions, 4 rotary embeddings" in text
    assert "1 to 8 tokens per call, sequences of up to 64 tokens" in text
    assert f"wrote {bundle / 'engines' / 'sm86-sm89'}" in text
    code, out, err = engine(bundle, "--target", "rtx-4090", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((bundle / "engines" / "rtx-4090" / "build.json").read_text())
    code, out, err = engine(bundle, "--target", "rtx-4090", "--quiet", "--force")
    assert (code, out, err) == (0, "", "")


@pytest.mark.tensorrt
def test_a_tensorrt_error_is_shown_as_a_kvexport_error_without_other_output(bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    arguments = ["--compute-capability", "8.6", "--workspace", "1", "--chunk", "64"]
    ran = subprocess.run(
        [sys.executable, "-m", "kvexport", "engine", bundle, *arguments], capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout) == (3, "")
    assert "could not build this engine" in ran.stderr and "within workspace limit" in ran.stderr
    assert "fix:      raise or leave out --workspace" in ran.stderr and "Traceback" not in ran.stderr
    assert not (bundle / "engines").exists()


@without_gpu
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--target", "orin-nano-8gb"], 3, "copy the bundle to the device"),
        (["--target", "cpu"], 2, "needs no engine"),
        (["--target", "toaster"], 2, "the target must be a shipped target"),
        (["--chunk", "65", "--target", "rtx-4090"], 2, "1 to 64"),
        (["--batch", "x"], 2, "--batch"),
    ],
)
def test_rejects_targets_and_options_that_cannot_be_built_here(
    arguments: list[str], code: int, message: str, bundle: Path
) -> None:
    exit_code, out, err = engine(bundle, *arguments)
    assert (exit_code, out) == (code, "") and message in err
    assert not (bundle / "engines").exists()


@without_gpu
@pytest.mark.tensorrt
def test_without_a_gpu_the_compute_capability_must_be_given(bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    code, _, err = engine(bundle)
    assert code == 2 and "--compute-capability 8.6" in err
    code, _, err = engine(bundle, "--compute-capability", "8.7")
    assert code == 2 and "7.5, 8.0, 8.6, 8.9, 12.0, 12.1" in err


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_does_not_replace_a_folder_that_is_not_an_engine(force: list[str], bundle: Path) -> None:
    (bundle / "engines" / "rtx-4090").mkdir(parents=True)
    code, out, err = engine(bundle, "--target", "rtx-4090", *force)
    assert (code, out) == (2, "") and f"fix:      rm -r {bundle / 'engines' / 'rtx-4090'}" in err
    assert (bundle / "engines" / "rtx-4090").is_dir()


def test_rejects_a_path_that_is_not_a_bundle(tmp_path: Path) -> None:
    code, out, err = engine(tmp_path / "nowhere", "--target", "rtx-4090")
    assert (code, out) == (2, "") and "must be a bundle" in err


@without_gpu
def test_without_tensorrt_the_error_names_the_extra_to_install(bundle: Path) -> None:
    hidden = (
        "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if 'tensorrt' in n "
        "else f(n, *a)"
    )
    script = f"{hidden}; from kvexport.cli import main; "
    script += f"main(['engine', {str(bundle)!r}])"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 3 and "pip install 'kvexport[rtx]'" in ran.stderr


@pytest.mark.parametrize("command", ["engine", "lint"])
def test_a_missing_graph_package_is_named_without_the_extra_that_brings_torch(
    command: str, bundle: Path
) -> None:
    hidden = "import sys; sys.modules.update({'onnx_ir': None})"
    script = f"{hidden}; from kvexport.cli import main; "
    script += f"main([{command!r}, {str(bundle)!r}, '--target', 'rtx-4090'])"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 3 and "onnx_ir" in ran.stderr and "pip install" in ran.stderr, ran.stderr
    assert "convert" not in ran.stderr


def test_reading_an_engine_record_imports_no_graph_package() -> None:
    found = (
        "[name for name in ('onnx', 'onnx_ir', 'polygraphy', 'tensorrt_rtx', 'torch') if name in sys.modules]"
    )
    script = f"from kvexport.engine import read_record, engine_directory; import sys; print({found})"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
