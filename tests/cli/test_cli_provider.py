"""Tests of --provider of `run`, `validate` and `evaluate`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.command_line import Ended, run_kvexport
from support.decoders import make_decoder
from support.simulated_device import SimulatedDevice, add_engine, only_gpu
from support.tiny_bundles import byte_level_tokenizer, write_bundle
from support.validated_bundles import export

from kvexport.cli.options import provider_option
from kvexport.model.checkpoint import Checkpoint
from kvexport.model.loader import load_decoder
from kvexport.runtime.backends.select import PROVIDERS

Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, text.txt, and bundles with engines: `text`, and `validated` with reference outputs."""
    folder = tmp_path_factory.mktemp("provider")
    shutil.copytree(
        tiny_checkpoint("llama", num_key_value_heads=4, vocab_size=320, eos_token_id=None),
        folder / "checkpoint",
    )
    (folder / "checkpoint" / "tokenizer.json").write_text(byte_level_tokenizer(), encoding="utf-8")
    (folder / "text.txt").write_text(
        "Once upon a time there was a cafe; everyone in it smiled. " * 8, encoding="utf-8"
    )
    decoder = load_decoder(Checkpoint(folder / "checkpoint"))
    add_engine(write_bundle(folder / "text", decoder, tokenizer=byte_level_tokenizer()))
    export(folder / "validated", make_decoder("llama", dtype=torch.float32))
    add_engine(folder / "validated", lowering="decomposed17")
    return folder


@pytest.fixture
def run(folder: Path) -> Run:
    """`run(command, *options)`: adds the command's arguments; exit code, standard output, standard error."""
    arguments = {
        "run": [folder / "text", "--prompt", "Once", "--max-new-tokens", 6],
        "validate": [folder / "validated"],
        "evaluate": [
            *(folder / "text", "--against", folder / "checkpoint"),
            *("--text", folder / "text.txt", "--length", 24),
        ],
    }
    return lambda command, *options: run_kvexport(command, *arguments[command], *options)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimulatedDevice:
    return only_gpu(monkeypatch)


@pytest.mark.parametrize("command", ["run", "validate", "evaluate"])
def test_a_provider_without_its_hardware_exits_with_3_and_the_reason(command: str, run: Run) -> None:
    """On the machine that runs the test: nothing is simulated."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine may have the hardware")
    code, out, err = run(command, "--provider", "tensorrt")
    assert (
        (code, out) == (3, "")
        and re.search(r"cuda-bindings|no NVIDIA driver|finds no GPU", err)
        and "fix:" in err
    )
    code, out, err = run(command, "--provider", "cuda")
    assert (code, out) == (3, "") and "ONNX Runtime must be built with CUDA" in err and "kvexport[gpu]" in err


@pytest.mark.parametrize("command", ["run", "validate", "evaluate"])
def test_auto_falls_back_to_the_cpu(command: str, run: Run) -> None:
    code, out, err = run(command, "--provider", "auto")
    warnings = [line for line in err.splitlines() if "provider auto: using cpu" in line]
    assert len(warnings) == 1 and "the bundle's TensorRT engine cannot be used" in warnings[0]
    rest = "".join(f"{line}\n" for line in err.splitlines() if line not in warnings)
    assert (code, out, rest) == run(command, "--provider", "cpu") or command == "run"  # it prints speeds
    assert run(command)[0] == 0


def test_the_choices_are_the_providers_of_the_runtime() -> None:
    @provider_option
    def command() -> None: ...

    (option,) = command.__click_params__  # type: ignore[attr-defined]
    assert tuple(option.type.choices) == PROVIDERS


@pytest.mark.parametrize("command", ["run", "validate", "evaluate"])
def test_an_unknown_provider_exits_with_2(command: str, run: Run) -> None:
    code, out, err = run(command, "--provider", "rocm")
    assert (code, out) == (2, "") and "tensorrt" in err


def test_run_names_the_provider(run: Run, device: SimulatedDevice) -> None:
    ended = {provider: run("run", "--provider", provider) for provider in ("cpu", "cuda", "tensorrt")}
    assert [code for code, _, _ in ended.values()] == [0, 0, 0]
    assert len({out for _, out, _ in ended.values()}) == 1
    for provider, name in {"cpu": "the CPU", "cuda": "CUDA", "tensorrt": "TensorRT"}.items():
        assert f"/s on {name}; KV cache" in ended[provider][2]
    assert "on TensorRT" in run("run")[2]  # "auto"


def test_validate_names_the_provider_and_the_outputs_compared(run: Run, device: SimulatedDevice) -> None:
    code, out, err = run("validate", "--provider", "tensorrt")
    assert (code, err) == (0, "") and "on tensorrt: key, value, logits)" in out and "residual" not in out
    report = json.loads(run("validate", "--provider", "tensorrt", "--json")[1])
    assert (report["provider"], report["compared"]) == ("tensorrt", ["key", "value", "logits"])
    code, out, _ = run("validate", "--provider", "cuda")
    assert code == 0 and "on cuda: key, value, attention, residual, logits)" in out
    assert "on cpu" not in run("validate", "--provider", "cpu")[1]


def test_a_wrong_engine_exits_with_1_and_names_the_outputs_that_differ(
    run: Run, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "kvexport.runtime.backends.tensorrt.TensorRtDecoder.write_updates", lambda *arguments: None
    )
    code, out, err = run("validate", "--provider", "tensorrt")
    assert code == 1 and "FAILED" in out and "layers.0.key" in err


def test_evaluate_runs_on_the_engine(run: Run, device: SimulatedDevice) -> None:
    results = {
        provider: json.loads(run("evaluate", "--provider", provider, "--json")[1])
        for provider in ("cpu", "tensorrt")
    }
    assert "engine" in device.done
    assert results["tensorrt"]["cross_entropy"] == pytest.approx(results["cpu"]["cross_entropy"], abs=1e-4)


_WITHOUT_ONNXRUNTIME = """
import sys
sys.modules["onnxruntime"] = None
from kvexport.cli import main
from kvexport.cli.options import provider_option
main(["run", sys.argv[1], "--prompt", "Once", "--provider", sys.argv[2]])
"""


@pytest.mark.parametrize("provider", ["auto", "cpu", "cuda"])
def test_a_missing_onnxruntime_is_named_with_its_extra(folder: Path, provider: str) -> None:
    command = [sys.executable, "-c", _WITHOUT_ONNXRUNTIME, str(folder / "text"), provider]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (
        ran.returncode == 3 and "onnxruntime is not installed" in ran.stderr and "kvexport[cpu]" in ran.stderr
    )


def test_running_an_engine_imports_no_onnxruntime(folder: Path) -> None:
    """The modules that run an engine import none of these packages; this test only imports them."""
    modules = ("session", "backends.tensorrt", "backends.tensorrt_select", "backends.cuda")
    script = f"import sys, {', '.join(f'kvexport.runtime.{module}' for module in modules)}\n"
    script += "assert not {'onnxruntime', 'onnx', 'onnx_ir', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("command", ["run", "validate"])
def test_quiet_and_another_provider_silence_the_warning_of_auto(command: str, run: Run) -> None:
    for options, count in (((), 1), (("--quiet",), 0), (("--provider", "cpu"), 0)):
        code, _, err = run(command, *options)
        assert (code, err.count("kvexport: provider auto: using cpu")) == (0, count), err
