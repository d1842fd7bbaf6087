"""Text that a model samples itself, so that calibration needs no data set.

Knows how to decode in batches with the reference's static cache, and how much memory that takes; must not
know what the windows are for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import psutil
import torch
from torch import Tensor

from kvexport import reference
from kvexport.decoder import Decoder, tensors_of
from kvexport.errors import CannotRunHere

_BATCH = 32  # windows sampled side by side


def sample_windows(
    decoder: Decoder,
    samples: int,
    length: int,
    temperatures: tuple[float, ...],
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> Tensor:
    """Windows [samples, length] of int64 token ids sampled from the model itself, in random order.

    Each window begins with the model's BOS token (without one: a random token) and runs on past any end of
    text. The windows are shared out evenly among `temperatures`. `advance` is called once a step and batch.

    Raises:
        CannotRunHere: the whole model does not fit in this machine's free memory.
    """
    _require_memory(decoder, min(samples, _BATCH), length)
    whole = dataclasses.replace(decoder, layers=list(decoder.layers))
    generator = torch.Generator().manual_seed(seed)
    heat = torch.tensor([temperatures[i % len(temperatures)] for i in range(samples)])
    parts = [_sample(whole, heat[start : start + _BATCH], length, generator, advance) for start in range(0, samples, _BATCH)]
    return torch.cat(parts)[torch.randperm(samples, generator=generator)]


def steps(samples: int, length: int) -> int:
    """How often `sample_windows` calls `advance`."""
    return -(-samples // _BATCH) * (length - 1)


def _sample(decoder: Decoder, heat: Tensor, length: int, generator: torch.Generator, advance: Callable[[], None]) -> Tensor:
    batch = len(heat)
    if decoder.bos_token_id is None:
        tokens = torch.randint(decoder.limits.vocab_size, (batch, 1), generator=generator)
    else:
        tokens = torch.full((batch, 1), decoder.bos_token_id)
    cache = reference.new_cache(decoder.layers, batch, length, decoder.embedding.weight.dtype)
    for position in range(length - 1):
        at = torch.full((batch, 1), position)
        logits = reference.forward(decoder, tokens[:, -1:], at, cache)[:, 0]  # [B, vocab]
        probabilities = torch.softmax(logits / heat[:, None], dim=-1)
        tokens = torch.cat((tokens, torch.multinomial(probabilities, 1, generator=generator)), dim=1)
        advance()
    return tokens


def _require_memory(decoder: Decoder, batch: int, length: int) -> None:
    layer = decoder.layers[0]
    each = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(layer))
    cache = batch * length * layer.attention.kv_width * layer.mlp.up.weight.element_size()
    needed = len(decoder.layers) * (each + cache)
    free = psutil.virtual_memory().available
    if needed > free:
        raise CannotRunHere(
            "the model does not fit in memory as a whole, which sampling its own text needs",
            seen=f"{free / 2**30:.1f} GiB free",
            allowed=f"{needed / 2**30:.1f} GiB or more",
            fix="use --calibration random (one layer in memory at a time), or --calibration FILE",
        )
