"""Tiny random decoders with every kind of attention, made without transformers; float64 by default."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvexport.model.decoder import Attention, Decoder, Embedding, Layer, Linear, Mlp, ModelDims, Norm, Rope
from kvexport.model.rope import alibi_slopes

STYLES = ("llama", "gqa", "bias", "qwen3", "bloom", "window")


def make_decoder(
    style: str = "llama",
    *,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int | None = None,
    head_dim: int = 8,
    hidden: int = 32,
    vocab: int = 40,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    max_positions: int | None = 256,
    window: int | None = None,
    theta: float = 10000.0,
    sharpness: float = 1.0,
) -> Decoder:
    """A random decoder of one of `STYLES`.

    'llama' rotates; 'gqa' shares each KV head between two queries; 'bias' has QKV biases; 'qwen3' normalises
    queries and keys; 'bloom' has ALiBi, LayerNorm and biases everywhere; 'window' sees 5 positions back.
    `sharpness` multiplies W_Q: larger, more peaked attention.
    """
    assert style in STYLES
    bloom, qk_norm, qkv_bias = style == "bloom", style == "qwen3", style in ("bias", "bloom")
    kv_heads = (heads // 2 if style == "gqa" else heads) if kv_heads is None else kv_heads
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def linear(out: int, into: int, bias: bool = False, gain: float = 1.0) -> Linear:
        weight = random(out, into) * gain / into**0.5
        return Linear(weight.to(dtype), (0.5 * random(out)).to(dtype) if bias else None)

    def norm(width: int, kind: str = "layer" if bloom else "rms") -> Norm:
        weight, bias = 1 + 0.2 * random(width), 0.2 * random(width)
        return Norm(
            "layer" if kind == "layer" else "rms",
            weight.to(dtype),
            bias.to(dtype) if kind == "layer" else None,
            1e-5,
        )

    rope = Rope(1 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim))

    def layer() -> Layer:
        attention = Attention(
            q=linear(heads * head_dim, hidden, qkv_bias, sharpness),
            k=linear(kv_heads * head_dim, hidden, qkv_bias),
            v=linear(kv_heads * head_dim, hidden, qkv_bias),
            o=linear(hidden, heads * head_dim, bloom),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            scale=1 / math.sqrt(head_dim),
            rope=None if bloom else rope,
            q_norm=norm(head_dim, "rms") if qk_norm else None,
            k_norm=norm(head_dim, "rms") if qk_norm else None,
            alibi_slopes=alibi_slopes(heads, dtype) if bloom else None,
            window=5 if style == "window" and window is None else window,
        )
        inner = 2 * hidden
        gate = None if bloom else linear(inner, hidden)
        up, down = linear(inner, hidden, bloom), linear(hidden, inner, bloom)
        return Layer(
            norm(hidden), attention, norm(hidden), Mlp(gate, up, down, "gelu_tanh" if bloom else "silu")
        )

    return Decoder(
        embedding=Embedding(random(vocab, hidden).to(dtype), norm(hidden) if bloom else None),
        layers=[layer() for _ in range(layers)],
        final_norm=norm(hidden),
        head=None if bloom else linear(vocab, hidden),
        dims=ModelDims(vocab, hidden, max_positions),
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def make_attention(style: str = "llama", **sizes: Any) -> Attention:
    """The attention of a decoder with one layer."""
    return make_decoder(style, layers=1, **sizes).layers[0].attention


def with_attention(decoder: Decoder, change: Callable[[Attention], Attention]) -> Decoder:
    """Apply `change` to the attention of every layer."""
    layers = [dataclasses.replace(layer, attention=change(layer.attention)) for layer in decoder.layers]
    return dataclasses.replace(decoder, layers=layers)


def random_inputs(
    windows: int, length: int, hidden: int = 32, seed: int = 7, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Normed inputs [windows, length, hidden] whose channels are correlated and of unequal power."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    mixing = random(hidden, hidden) * torch.logspace(0, -2, hidden, dtype=torch.float64)
    return (random(windows, length, hidden) @ mixing.T / hidden**0.5 + 0.3 * random(hidden)).to(dtype)


def random_windows(decoder: Decoder, windows: int, length: int, seed: int = 3) -> Tensor:
    """Token ids [windows, length]."""
    return torch.randint(
        decoder.dims.vocab_size, (windows, length), generator=torch.Generator().manual_seed(seed)
    )
