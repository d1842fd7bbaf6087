"""Measure codes far from the positions of their calibration: the same windows at growing offsets of the
context.

Rotary logits depend only on the distance between query and key, so that the trained model's outputs for a
window do not depend on its offset, even beyond the trained positions. A change with the offset is a loss of
the code.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from quality_measure import Bench
from quality_rows import chosen
from torch import Tensor

from kvexport.calibrate import windows as attention_windows
from kvexport.errors import UsageError
from kvexport.model import reference
from kvexport.model.decoder import Attention, Decoder

OFFSETS = (0, 256, 512, 1024, 2048)  # of the first token, and the last window of the context
WINDOWS = 32  # of each text
TRAINED = "trained"


@torch.no_grad()
def stream_at(decoder: Decoder, windows: Tensor, offset: int) -> Tensor:
    """The residual stream [N, S, hidden] after the last layer of token ids [N, S] at positions offset ..
    offset + S - 1."""
    positions = offset + torch.arange(windows.shape[1])[None]
    x = reference.embed(decoder.embedding, windows, positions)
    for layer in decoder.layers:
        attend = partial(_attend_at, layer.attention, positions)
        for batch in attention_windows.batches(range(len(x)), x.shape[1]):
            x[batch] = reference.run_block(layer, x[batch], attend).residual
    return x


def _attend_at(attention: Attention, positions: Tensor, x: Tensor) -> Tensor:
    projected = reference.project(attention, x, positions)
    return reference.linear(attention.o, attention_windows.head_outputs(attention, projected))


def offsets(length: int, long: int) -> list[int]:
    """Where windows of `length` tokens are placed in a context of `long`."""
    last = max(long - length, 0)
    return sorted({offset for offset in OFFSETS if offset < last} | {0, last})


def lines(length: int, long: int) -> dict[str, tuple[str, int]]:
    """By name, the method and the capacity that its codes are made for."""
    return {
        f"online-{length}": ("online", length),
        f"online-{long}": ("online", long),
        "fold": ("fold", length),
    }


def curve(bench: Bench, name: str, long: int) -> dict[str, Any]:
    """Mean KL to the trained model without offset, nats per token, by text and offset, at half of the KV
    numbers.

    Args:
        name: one of `lines`, or `TRAINED`: what rounding makes of the trained model itself.

    Raises:
        UsageError: the model does not rotate.
    """
    decoder, places = bench.decoder, offsets(bench.length, long)
    if bench.attention.rope is None:
        raise UsageError("an offset says something of rotary positions only", got="a model without RoPE")
    if name != TRAINED:
        method, capacity = lines(bench.length, long)[name]
        choice = chosen(method, 0.5, capacity)(bench, bench.calibration())
        decoder, _ = bench.convert(choice.layer_plans, capacity)
    found: dict[str, list[float]] = {text: [] for text in bench.texts}
    for offset in places:
        for text, figures in bench.divergences(partial(stream_at, decoder, offset=offset), WINDOWS).items():
            found[text].append(figures["mean_kl"])
    return {"offsets": places, "length": bench.length, "kl": found}
