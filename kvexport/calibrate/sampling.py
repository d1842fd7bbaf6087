"""Calibration text sampled from the model itself, so that calibration needs no data set."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import psutil
import torch
from torch import Tensor

from kvexport.errors import CannotRunHere, CheckpointError
from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer, tensors_of
from kvexport.model.placement import CPU, place

_log = logging.getLogger("kvexport.calibrate")
CACHE_BYTES = 1 << 32  # KV cache of the windows that are sampled in one batch


def sample_windows(
    decoder: Decoder,
    samples: int,
    length: int,
    temperatures: tuple[float, ...],
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> Tensor:
    """Sample windows of token ids from the model, in random order.

    Each window starts with the model's BOS token (without one: a random token) and continues past any EOS
    token.

    Args:
        decoder: the trained model; all of its layers are loaded, on the CPU if its GPU lacks the memory.
        samples: number of windows.
        length: tokens per window.
        temperatures: sampling temperatures, used for equally many windows each.
        seed: random seed.
        advance: called once per step and batch, `sampling_steps` times in all.

    Returns:
        Token ids [samples, length] int64.

    Raises:
        CannotRunHere: the whole model does not fit into the free memory of this machine.
        CheckpointError: its logits are not finite.
    """
    first, count = decoder.layers[0], len(decoder.layers)
    batch = _batch(first, count, samples, length)
    decoder = _where_it_fits(decoder, _needed(first, count, batch, length))
    del first
    whole = dataclasses.replace(decoder, layers=list(decoder.layers))
    generator = torch.Generator().manual_seed(seed)
    per_window = torch.tensor([temperatures[i % len(temperatures)] for i in range(samples)])
    parts = [
        _sample(whole, per_window[start : start + batch], length, generator, advance)
        for start in range(0, samples, batch)
    ]
    return torch.cat(parts)[torch.randperm(samples, generator=generator)]


def can_sample(decoder: Decoder, samples: int, length: int) -> bool:
    """Whether some device has the memory to sample windows as `sample_windows` does."""
    first, count = decoder.layers[0], len(decoder.layers)
    try:
        _where_it_fits(decoder, _needed(first, count, _batch(first, count, samples, length), length))
    except CannotRunHere:
        return False
    return True


def sampling_steps(decoder: Decoder, samples: int, length: int) -> int:
    """Number of calls of `advance` by `sample_windows`."""
    return -(-samples // _batch(decoder.layers[0], len(decoder.layers), samples, length)) * (length - 1)


def _batch(layer: Layer, count: int, samples: int, length: int) -> int:
    """Windows per batch. Depends on the model alone: a seed gives the same windows on every machine."""
    return max(1, min(samples, CACHE_BYTES // _cache_bytes(layer, count, length)))


def _cache_bytes(layer: Layer, count: int, length: int) -> int:
    """Bytes of the KV cache of one window in `count` layers."""
    return count * length * layer.attention.kv_width * layer.mlp.up.weight.element_size()


def _sample(
    decoder: Decoder,
    temperatures: Tensor,
    length: int,
    generator: torch.Generator,
    advance: Callable[[], None],
) -> Tensor:
    """One batch of windows [B, length] int64, one temperature per window [B]."""
    batch = len(temperatures)
    if decoder.bos_token_id is None:
        tokens = torch.randint(decoder.dims.vocab_size, (batch, 1), generator=generator)
    else:
        tokens = torch.full((batch, 1), decoder.bos_token_id)
    cache = reference.new_cache(decoder.layers, batch, length, decoder.embedding.weight.dtype)
    for position in range(length - 1):
        at = torch.full((batch, 1), position)
        logits = reference.forward(decoder, tokens[:, -1:], at, cache)[:, 0].cpu()  # [B, vocab]
        probabilities = torch.softmax(logits / temperatures[:, None], dim=-1)
        if not bool(probabilities.isfinite().all()):
            raise CheckpointError(
                "the logits of the model must be finite to sample calibration text from it",
                got="NaN or infinite logits",
                fix="use an undamaged checkpoint; weights that overflow float32 are a usual cause",
            )
        tokens = torch.cat((tokens, torch.multinomial(probabilities, 1, generator=generator)), dim=1)
        advance()
    return tokens


def _needed(layer: Layer, count: int, batch: int, length: int) -> int:
    """Bytes of all layers and of the KV cache of one batch."""
    each = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(layer))
    return count * each + batch * _cache_bytes(layer, count, length)


def _where_it_fits(decoder: Decoder, needed: int) -> Decoder:
    """The decoder on its device, or on the CPU if only that has the memory for all layers.

    Raises:
        CannotRunHere: neither has it.
    """
    device = decoder.embedding.weight.device
    if device.type != CPU:
        free = _free_memory(device)
        if needed <= free:
            return decoder
        _log.warning(
            "calibration text is sampled on the CPU: the model needs %.1f GiB, and %s has %.1f GiB free",
            needed / 2**30,
            device,
            free / 2**30,
        )
    free = _free_memory(torch.device(CPU))
    if needed > free:
        raise CannotRunHere(
            "sampling calibration text from the model needs memory for all of its layers",
            got=f"{free / 2**30:.1f} GiB free",
            expected=f"{needed / 2**30:.1f} GiB or more",
            fix="use --calibration random (one layer in memory at a time), or --calibration FILE",
        )
    return place(decoder, torch.device(CPU))


def _free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
