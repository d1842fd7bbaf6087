"""Windows sampled from the model: shape, seed, temperatures, distribution, and the check of memory."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from support.decoders import make_decoder
from torch import Tensor

from kvexport.calibrate import sampling, sampling_steps
from kvexport.calibrate.sampling import sample_windows
from kvexport.errors import CannotRunHere, CheckpointError
from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer, LazyLayers
from kvexport.model.placement import place


def test_windows_start_with_bos() -> None:
    decoder = make_decoder(dtype=torch.float32)
    windows = sample_windows(decoder, 5, 12, (1.0, 1.5), seed=0)
    assert windows.shape == (5, 12)
    assert windows.dtype == torch.int64
    assert (windows[:, 0] == decoder.bos_token_id).all()
    assert 0 <= int(windows.min()) <= int(windows.max()) < decoder.dims.vocab_size


def test_windows_without_bos_start_with_random_tokens() -> None:
    decoder = dataclasses.replace(make_decoder(dtype=torch.float32), bos_token_id=None)
    assert len(set(sample_windows(decoder, 16, 2, (1.0,), seed=0)[:, 0].tolist())) > 4


def test_seed_determines_the_windows() -> None:
    decoder = make_decoder(dtype=torch.float32)
    first = sample_windows(decoder, 4, 10, (1.0,), seed=1)
    torch.manual_seed(99)  # the global generator is not used
    assert torch.equal(first, sample_windows(decoder, 4, 10, (1.0,), seed=1))
    assert not torch.equal(first, sample_windows(decoder, 4, 10, (1.0,), seed=2))


def test_progress_advances_sampling_steps_times(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder(dtype=torch.float32)
    one_window = len(decoder.layers) * 5 * decoder.layers[0].attention.kv_width * 4
    monkeypatch.setattr(sampling, "CACHE_BYTES", 3 * one_window)
    calls: list[None] = []
    windows = sample_windows(decoder, 7, 5, (1.0,), 0, lambda: calls.append(None))
    assert windows.shape == (7, 5)
    assert len(calls) == sampling_steps(decoder, 7, 5) == 3 * 4


def _constant_logits(decoder: Decoder, logits: Tensor) -> Decoder:
    """A decoder that predicts `logits` for any input: its final norm gives one constant vector."""
    assert decoder.head is not None
    final_norm = dataclasses.replace(
        decoder.final_norm, kind="layer", weight=torch.zeros(32), bias=torch.eye(32)[0]
    )
    head = dataclasses.replace(decoder.head, weight=torch.nn.functional.pad(logits[:, None], (0, 31)))
    return dataclasses.replace(decoder, final_norm=final_norm, head=head)


def test_temperatures_scale_the_logits_for_equally_many_windows() -> None:
    """With known logits each half of the windows follows its softmax: chi-square of 5 classes below 20."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    decoder = _constant_logits(make_decoder(vocab=5, layers=1, dtype=torch.float32), logits)
    for temperature in (0.5, 2.0):
        assert (
            _chi_square(
                sample_windows(decoder, 16, 80, (temperature,), seed=3)[:, 1:],
                torch.softmax(logits / temperature, 0),
            )
            < 20
        )
        assert (
            _chi_square(
                sample_windows(decoder, 16, 80, (1.7 * temperature,), seed=3)[:, 1:],
                torch.softmax(logits / temperature, 0),
            )
            > 50
        )
    mixed = sample_windows(decoder, 8, 80, (0.5, 2.0), seed=3)[:, 1:]
    cool, hot = torch.softmax(logits / 0.5, 0), torch.softmax(logits / 2.0, 0)
    sides = [_chi_square(row, cool) < _chi_square(row, hot) for row in mixed]
    assert sum(sides) == 4
    assert (
        sides != [True] * 4 + [False] * 4
    )  # in random order, so that held-out windows have both temperatures
    assert sides != [True, False] * 4


def _chi_square(tokens: Tensor, probabilities: Tensor) -> float:
    counts = torch.bincount(tokens.flatten(), minlength=len(probabilities)).double()
    expected = probabilities.double() * counts.sum()
    return float(((counts - expected).square() / expected).sum())


def test_samples_follow_the_predictions_of_the_model() -> None:
    """Second tokens given the first, and third tokens given both, compared with the full forward pass."""
    decoder = make_decoder("gqa", vocab=4, layers=2, dtype=torch.float32, sharpness=3.0)
    windows = sample_windows(decoder, 1600, 3, (1.0,), seed=0)
    for length in (1, 2):
        for prefix in torch.unique(windows[:, :length], dim=0):
            chosen = windows[(windows[:, :length] == prefix).all(1)]
            expected = torch.softmax(reference.forward(decoder, prefix[None])[0, -1], dim=-1)
            if len(chosen) * float(expected.min()) > 5:
                assert _chi_square(chosen[:, length], expected) < 21  # 3 degrees of freedom: p = 1e-4


def test_checks_memory_before_loading_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder(layers=3, dtype=torch.float32)
    read: list[int] = []

    def layer(index: int) -> Layer:
        read.append(index)
        return decoder.layers[index]

    lazy = dataclasses.replace(decoder, layers=LazyLayers(3, layer))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100_000))
    with pytest.raises(CannotRunHere) as refusal:
        sample_windows(lazy, 4, 16, (1.0,), seed=0)
    assert "--calibration random" in str(refusal.value)
    assert "GiB" in str(refusal.value)
    assert read == [0]  # one layer, for its size


def test_accepts_exactly_the_memory_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder(layers=3, dtype=torch.float32)
    weights = 3 * 4 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32)
    cache = 3 * 4 * 4 * 16 * 2 * 32  # layers, bytes, windows, tokens, keys and values
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=weights + cache))
    assert sample_windows(decoder, 4, 16, (1.0,), seed=0).shape == (4, 16)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=weights + cache - 1))
    with pytest.raises(CannotRunHere):
        sample_windows(decoder, 4, 16, (1.0,), seed=0)


@pytest.mark.parametrize("bos", [1, None])
def test_a_seed_gives_the_same_windows_on_every_device(device: torch.device, bos: int | None) -> None:
    decoder = dataclasses.replace(make_decoder("gqa", dtype=torch.float32), bos_token_id=bos)
    here = sample_windows(decoder, 5, 12, (1.0, 1.5), seed=0)
    there = sample_windows(place(decoder, device), 5, 12, (1.0, 1.5), seed=0)
    assert there.device.type == "cpu" and torch.equal(here, there)


def test_a_model_that_is_too_large_for_the_gpu_samples_on_the_cpu(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ran: list[torch.device] = []
    forward = reference.forward

    def recorded(decoder: Decoder, *arguments: Any) -> Tensor:
        logits = forward(decoder, *arguments)
        ran.append(logits.device)
        return logits

    monkeypatch.setattr(reference, "forward", recorded)
    decoder = place(make_decoder(dtype=torch.float32), device)
    sample_windows(decoder, 2, 4, (1.0,), seed=0)
    assert set(ran) == {device} and not caplog.records
    ran.clear()
    monkeypatch.setattr(sampling, "_free_memory", lambda at: 1000 if at == device else 2**30)
    windows = sample_windows(decoder, 2, 4, (1.0,), seed=0)
    assert windows.shape == (2, 4) and {each.type for each in ran} == {"cpu"}
    assert "sampled on the CPU" in caplog.text


def test_logits_that_are_not_finite_are_refused() -> None:
    decoder = make_decoder(dtype=torch.float32)
    assert decoder.head is not None
    head = dataclasses.replace(decoder.head, weight=decoder.head.weight * 3e38)
    with pytest.raises(CheckpointError, match="the logits of the model must be finite"):
        sample_windows(dataclasses.replace(decoder, head=head), 2, 4, (1.0,), seed=0)
