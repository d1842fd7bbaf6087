"""Evaluate the loss from compression: a bundle's predictions against the trained model's, on a text.

Both run over the same windows: the trained model in the PyTorch reference, one layer in memory at a time, the
bundle in the runtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvexport.bundle import Bundle
from kvexport.calibrate import windows as attention_windows
from kvexport.calibrate.text import all_windows, read_text, tokenize
from kvexport.errors import UsageError
from kvexport.model import reference
from kvexport.model.checkpoint import Checkpoint
from kvexport.model.decoder import Decoder
from kvexport.model.divergence import Divergence, DivergenceMeter
from kvexport.model.loader import load_decoder
from kvexport.model.placement import AUTO, device_computation, place, resolve_device
from kvexport.progress import Progress
from kvexport.runtime import open_bundle

_LENGTH = 256  # of a window in tokens


@dataclass(frozen=True)
class Evaluation:
    """A divergence from the trained model, and the KV bytes per token of both, in the bundle's dtype."""

    divergence: Divergence
    kv_bytes_per_token: int
    kv_bytes_per_token_original: int

    def to_json(self) -> dict[str, Any]:
        """The evaluation as JSON values."""
        sizes = {
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kv_bytes_per_token_original": self.kv_bytes_per_token_original,
        }
        return self.divergence.to_json() | sizes


@device_computation()
def evaluate(
    bundle: Path,
    checkpoint: Path,
    text: Path,
    progress: Progress,
    *,
    length: int | None = None,
    samples: int | None = None,
    provider: str = "auto",
    device: str = AUTO,
) -> Evaluation:
    """Run the trained model and the bundle, teacher-forced, over windows of `length` tokens of a text.

    Args:
        length: tokens of a window; None: 256, or the bundle's capacity if that is less.
        samples: maximum number of windows, spread evenly over the text; None: all.
        provider: the provider that runs the bundle, as in `kvexport.runtime.Session`.
        device: the device that PyTorch runs the trained model on, as `resolve_device` takes it.

    Raises:
        UsageError: the checkpoint and the bundle have different vocabularies, or the text fills no window.
        BundleError: the bundle is damaged.
        CannotRunHere: this machine has no kernels for its dtype, or lacks what the provider or the device
            needs.
    """
    chosen = resolve_device(device)
    source, opened = Checkpoint(checkpoint), Bundle.open(bundle)
    decoder = place(load_decoder(source, context=opened.capacity), chosen)
    if decoder.dims.vocab_size != opened.model.vocab_size:
        raise UsageError(
            "the checkpoint must be the one that the bundle was built from: their vocabularies differ",
            got=f"{decoder.dims.vocab_size} tokens in {checkpoint}",
            expected=f"{opened.model.vocab_size} tokens, as in {bundle}",
            fix=f"use --against with the checkpoint '{opened.source.name}'",
        )
    if source.digest() != opened.source.sha256:
        progress.note(
            f"{checkpoint} is not the checkpoint that the bundle was built from ('{opened.source.name}'): "
            "its sha256 differs"
        )
    session = open_bundle(bundle, provider=provider)
    length = min(_LENGTH, session.capacity) if length is None else length
    if length > session.capacity:
        raise UsageError(
            "--length must not exceed the bundle's capacity",
            got=length,
            expected=f"at most {session.capacity}",
        )
    windows = spread(all_windows(tokenize(checkpoint, read_text(text)), length, f"the text {text}"), samples)
    stream = residual_stream(decoder, windows, progress)
    meter = DivergenceMeter()
    with progress.stage("Running the bundle", len(windows)), torch.no_grad():
        for window, x in zip(windows, stream, strict=True):
            compressed = torch.from_numpy(session.score(window[None].numpy()))
            meter.add(reference.logits(decoder, x[None]), compressed, window[None])
            progress.advance()
    return Evaluation(meter.finish(), opened.kv_bytes_per_token, opened.kv_bytes_per_token_original)


def spread(windows: Tensor, samples: int | None) -> Tensor:
    """At most `samples` of the windows [N, length], evenly spaced."""
    if samples is None or samples >= len(windows):
        return windows
    return windows[torch.linspace(0, len(windows) - 1, samples).round().long()]


@torch.no_grad()
def divergence_of(original: Decoder, converted: Decoder, windows: Tensor) -> Divergence:
    """The divergence of the converted model's predictions from the original's on windows [N, length]."""
    meter, silent = DivergenceMeter(), Progress()
    streams = (residual_stream(decoder, windows, silent) for decoder in (original, converted))
    for window, before, after in zip(windows, *streams, strict=True):
        meter.add(
            reference.logits(original, before[None]), reference.logits(converted, after[None]), window[None]
        )
    return meter.finish()


@torch.no_grad()
def residual_stream(decoder: Decoder, windows: Tensor, progress: Progress) -> Tensor:
    """The residual stream [N, length, hidden] after the last layer, one layer in memory at a time."""
    x = reference.embed(decoder.embedding, windows)
    with progress.stage("Running the original", len(decoder.layers)):
        for layer in decoder.layers:
            attention_windows.advance(layer, x)
            progress.advance()
    return x
