"""`--device` of every command that computes with PyTorch, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.command_line import run_kvexport
from support.tiny_bundles import write_bundle

from kvexport.model.loader import load_decoder

COMMANDS = {
    "build": ("-o", "{out}"),
    "compress": ("-o", "{out}"),
    "calibrate": ("-o", "{out}"),
    "analyze": ("-o", "{out}"),
    "evaluate": ("--against", "{source}", "--text", "{source}/config.json"),
}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("device", "code", "message"),
    [
        ("gpu", 2, "--device must be a device that PyTorch converts on"),
        ("cuda", 3, "--device cuda needs an NVIDIA GPU that PyTorch can use"),
        ("cuda:1", 3, "--device cuda:1 needs an NVIDIA GPU that PyTorch can use"),
    ],
)
def test_an_unusable_device_is_refused_before_any_work(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, command: str, device: str, code: int, message: str
) -> None:
    source, out = tiny_checkpoint("llama"), tmp_path / "out"
    options = [each.format(out=out, source=source) for each in COMMANDS[command]]
    ended, _, text = run_kvexport(command, source, *options, "--device", device)
    assert (ended, message in text) == (code, True), text
    assert "fix:" in text or "expected:" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "function"),
    [
        ("build", "kvexport.build.conversion_job.calibration_windows"),
        ("compress", "kvexport.build.conversion_job.calibration_windows"),
        ("calibrate", "kvexport.build.conversion_job.calibration_windows"),
        ("analyze", "kvexport.build.conversion_job.calibration_windows"),
        ("evaluate", "kvexport.validate.evaluate.load_decoder"),
    ],
)
def test_exhausted_gpu_memory_is_an_error_and_products_are_exact(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    function: str,
) -> None:
    precisions: list[str] = []

    def exhaust(*arguments: object, **named: object) -> None:
        precisions.append(torch.get_float32_matmul_precision())
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB")

    source, out = tiny_checkpoint("llama", num_key_value_heads=4), tmp_path / "out"
    given = source
    if command == "evaluate":
        given = write_bundle(tmp_path / "bundle", load_decoder(source))
    monkeypatch.setattr(function, exhaust)
    options = [each.format(out=out, source=source) for each in COMMANDS[command]]
    torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE sets it
    try:
        ended, _, text = run_kvexport(command, given, *options, "--device", "cpu")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert precisions == ["highest"]
    assert ended == 3 and "must fit into the memory of the GPU" in text and "--device cpu" in text, text
    assert not out.exists()
