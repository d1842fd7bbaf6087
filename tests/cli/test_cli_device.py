"""`--device` of every command that computes with PyTorch, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.command_line import run_kvexport

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
