"""`kvexport evaluate --device`: the trained model on another device, the bundle in its runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.decoders import make_decoder, random_windows
from support.healing import disturbed
from support.tiny_bundles import byte_level_tokenizer, write_bundle
from support.torch_device import take_for_cuda

from kvexport.model.loader import load_decoder
from kvexport.model.placement import place
from kvexport.progress import Progress
from kvexport.validate import evaluate as module
from kvexport.validate.evaluate import divergence_of, evaluate

TEXT = "Once upon a time there was a small house, and then there was not. " * 4
VOCAB = 300


def test_an_evaluation_is_that_of_the_cpu(
    tiny_checkpoint: Callable[..., Path],
    edit_checkpoint: Callable[..., Path],
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = edit_checkpoint(tiny_checkpoint("llama", vocab_size=VOCAB, num_key_value_heads=4))
    (checkpoint / "tokenizer.json").write_text(byte_level_tokenizer(VOCAB), encoding="utf-8")
    bundle = write_bundle(tmp_path / "bundle", disturbed(load_decoder(checkpoint)))
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    take_for_cuda(monkeypatch, device)
    here, there = (
        evaluate(bundle, checkpoint, text, Progress(), length=24, device=name) for name in ("cpu", "cuda")
    )
    assert there.divergence.mean_kl == pytest.approx(here.divergence.mean_kl, rel=1e-5)
    assert there.divergence.mean_kl > 0.01
    # control: the model runs on the device
    monkeypatch.setattr(
        module,
        "place",
        lambda decoder, at: replace(place(decoder, at), layers=decoder.layers),
    )
    with pytest.raises(RuntimeError, match="on the same device"):
        evaluate(bundle, checkpoint, text, Progress(), length=24, device="cuda")


def test_a_divergence_is_that_of_the_cpu(device: torch.device) -> None:
    original = make_decoder()
    changed, windows = disturbed(original), random_windows(original, 3, 10)
    assert divergence_of(place(original, device), place(changed, device), windows) == divergence_of(
        original, changed, windows
    )
