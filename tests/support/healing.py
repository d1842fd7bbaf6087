"""Disturbed decoders, for tests of healing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvexport.heal import HealOptions, HealResult, heal
from kvexport.model import reference
from kvexport.model.decoder import Attention, Decoder, Layer, Linear
from kvexport.progress import Progress
from support.decoders import make_decoder, random_windows


def disturbed(decoder: Decoder, amount: float = 0.3, seed: int = 5, rank: int | None = None) -> Decoder:
    """Add noise, of a rank if given, to the weights q, k, v and o of every layer, relative to their RMS."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def noisy(linear: Linear) -> Linear:
        weight, (out, into) = linear.weight.double(), linear.weight.shape
        noise = random(out, into) if rank is None else random(out, rank) @ random(rank, into) / rank**0.5
        return replace(
            linear, weight=(weight + amount * weight.square().mean().sqrt() * noise).to(linear.weight.dtype)
        )

    def change(layer: Layer) -> Layer:
        a = layer.attention
        return replace(layer, attention=replace(a, q=noisy(a.q), k=noisy(a.k), v=noisy(a.v), o=noisy(a.o)))

    return replace(decoder, layers=[change(layer) for layer in decoder.layers])


def mapped(attention: Attention, key_dim: int = 6, value_dim: int = 5, seed: int = 2) -> Attention:
    """Let pairs of heads share one head of `key_dim` and `value_dim` through random maps.

    Values are mapped in W_V, or after it if they are clipped.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator, dtype=torch.float64) / size[-2] ** 0.5).to(
            attention.q.weight.dtype
        )

    groups, d, heads = attention.num_kv_heads // 2, attention.head_dim, attention.num_heads
    return replace(
        attention,
        num_kv_heads=groups,
        v=Linear(random(groups * value_dim, attention.v.weight.shape[1]))
        if attention.clip is None
        else attention.v,
        value_encoder=None if attention.clip is None else random(groups, 2 * d, value_dim),
        key_map=random(groups, 2 * d, key_dim),
        query_map=random(heads, d, key_dim),
        value_map=random(heads, value_dim, d),
    )


def mean_kl(original: Decoder, converted: Decoder, windows: Tensor) -> float:
    """Mean KL from full logits in float64, nats per token."""
    p, q = (reference.forward(each, windows).double().log_softmax(-1) for each in (original, converted))
    return float((p.exp() * (p - q)).sum(-1).mean())


class Job:
    """A small decoder, a disturbed copy of it, and windows to heal on."""

    def __init__(self, style: str = "llama", dtype: torch.dtype = torch.float32, **sizes: Any) -> None:
        self.original = make_decoder(style, dtype=dtype, **sizes)
        self.converted = disturbed(self.original)
        self.windows = random_windows(self.original, 24, 12)
        self.held_out = random_windows(self.original, 8, 12, seed=9)

    def heal(
        self, steps: int = 40, state: Path | None = None, progress: Progress | None = None, **options: Any
    ) -> HealResult:
        heal_options = HealOptions(**{"steps": steps, "batch": 4, **options})
        return heal(
            self.original,
            self.converted,
            self.windows,
            self.held_out,
            heal_options,
            progress or Progress(),
            state,
        )
