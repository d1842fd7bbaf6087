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
from kvexport.model.decoder import Decoder

OFFSETS = (0, 256, 512, 1024, 2048)  # of the first token, and the last window of the context
WINDOWS = 32  # of each text
TRAINED = "trained"


@torch.no_grad()
def stream_at(decoder: Decoder, windows: Tensor, offset: int) -> Tensor:
    """The residual stream [N, S, hidden] after the last layer of token ids [N, S] at positions offset ..
    offset + S - 1."""
    assert decoder.rope is not None
    x = reference.embed(decoder.embedding, windows)
    positions = offset + torch.arange(windows.shape[1])
    for layer in decoder.layers:
        attention = layer.attention
        for batch in attention_windows.batches(range(len(x)), x.shape[1], attention.num_heads):
            part = x[batch]
            tables = reference.rotary_tables(decoder.rope, positions.expand(part.shape[:2]), x.dtype)
            projected = reference.project(attention, reference.norm(layer.attention_norm, part), tables)
            part += reference.linear(attention.o, attention_windows.head_outputs(attention, projected))
            part += reference.mlp(layer.mlp, reference.norm(layer.mlp_norm, part))
    return x


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
    if decoder.rope is None:
        raise UsageError(
            "an offset says something of rotary positions only", got=bench.attention.position, expected="rope"
        )
    if name != TRAINED:
        method, capacity = lines(bench.length, long)[name]
        choice = chosen(method, 0.5, capacity)(bench, bench.calibration())
        decoder, _ = bench.convert(choice.layer_plans, capacity)
    found: dict[str, list[float]] = {text: [] for text in bench.texts}
    for offset in places:
        for text, figures in bench.divergences(partial(stream_at, decoder, offset=offset), WINDOWS).items():
            found[text].append(figures["mean_kl"])
    return {"offsets": places, "length": bench.length, "kl": found}
