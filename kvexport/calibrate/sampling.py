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

from kvexport.errors import CannotRunHere
from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer, tensors_of

_CACHE_BYTES = 1 << 32  # of the windows that are sampled side by side


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
    first, count = decoder.layers[0], len(decoder.layers)
    batch = _batch(first, count, samples, length)
    _require_memory(first, count, batch, length)
    whole = dataclasses.replace(decoder, layers=list(decoder.layers))
    generator = torch.Generator().manual_seed(seed)
    heat = torch.tensor([temperatures[i % len(temperatures)] for i in range(samples)])
    parts = [
        _sample(whole, heat[start : start + batch], length, generator, advance)
        for start in range(0, samples, batch)
    ]
    return torch.cat(parts)[torch.randperm(samples, generator=generator)]


def steps(decoder: Decoder, samples: int, length: int) -> int:
    """How often `sample_windows` calls `advance`."""
    return -(-samples // _batch(decoder.layers[0], len(decoder.layers), samples, length)) * (length - 1)


def _batch(layer: Layer, count: int, samples: int, length: int) -> int:
    """Windows sampled side by side. It follows from the model alone, and so do the windows of a seed."""
    return max(1, min(samples, _CACHE_BYTES // _cache_bytes(layer, count, length)))


def _cache_bytes(layer: Layer, count: int, length: int) -> int:
    """Cache of one window in `count` layers."""
    return count * length * layer.attention.kv_width * layer.mlp.up.weight.element_size()


def _sample(
    decoder: Decoder, heat: Tensor, length: int, generator: torch.Generator, advance: Callable[[], None]
) -> Tensor:
    batch = len(heat)
    if decoder.bos_token_id is None:
        tokens = torch.randint(decoder.dims.vocab_size, (batch, 1), generator=generator)
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


def _require_memory(layer: Layer, count: int, batch: int, length: int) -> None:
    each = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(layer))
    needed = count * each + batch * _cache_bytes(layer, count, length)
    free = psutil.virtual_memory().available
    if needed > free:
        raise CannotRunHere(
            "the model does not fit in memory as a whole, which sampling its own text needs",
            got=f"{free / 2**30:.1f} GiB free",
            expected=f"{needed / 2**30:.1f} GiB or more",
            fix="use --calibration random (one layer in memory at a time), or --calibration FILE",
        )
