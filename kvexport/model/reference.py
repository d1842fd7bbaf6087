"""The oracle: the neutral decoder in plain PyTorch with a static cache, readable in one sitting.

Knows the mathematics of the forward pass and nothing of checkpoints, calibration or ONNX. Calibration
runs it layer by layer, the exported graph is compared with it. It computes in the dtype of the tensors
that it is given; norms and softmax in float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kvexport.eviction.config import Eviction
from kvexport.eviction.reference_cache import EvictingCache
from kvexport.model.decoder import Attention, Decoder, Embedding, Layer, Linear, Mlp, Norm, Rope


def linear(parameters: Linear, x: Tensor) -> Tensor:
    return F.linear(x, parameters.weight, parameters.bias)


def norm(parameters: Norm, x: Tensor) -> Tensor:
    wide = x.double() if x.dtype == torch.float64 else x.float()
    if parameters.kind == "rms":
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + parameters.eps)
        return parameters.weight * normed.to(x.dtype)
    assert parameters.bias is not None
    shape = (x.shape[-1],)
    return F.layer_norm(wide, shape, parameters.weight.to(wide), parameters.bias.to(wide), parameters.eps).to(
        x.dtype
    )


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def mlp_inner(parameters: Mlp, x: Tensor) -> Tensor:
    """What `down` takes, [..., intermediate]."""
    activation = ACTIVATIONS[parameters.activation]
    if parameters.gate is None:
        return activation(linear(parameters.up, x))
    return activation(linear(parameters.gate, x)) * linear(parameters.up, x)


def mlp(parameters: Mlp, x: Tensor) -> Tensor:
    return linear(parameters.down, mlp_inner(parameters, x))


def rotary_tables(rope: Rope, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [B, 1, S, head_dim/2], of int64 positions [B, S].

    Angles are float32 products, as trained models see them, whatever `dtype` is.
    """
    angles = positions[:, None, :, None].float() * rope.inv_freq.float()
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on [B, H, S, head_dim], half-split pairs."""
    cos, sin = tables
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _chosen(tables: tuple[Tensor, Tensor], frequencies: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = tables
    return cos[..., frequencies], sin[..., frequencies]


@dataclass(frozen=True)
class Projected:
    """What one layer's attention makes of its input, before any map that follows rotation: all [B, heads, S, width]."""

    query: Tensor  # normalised, not rotated
    key: Tensor  # normalised, not rotated
    query_rotated: Tensor  # the same tensor as `query` without rotation
    key_rotated: Tensor
    value: Tensor


def project(attention: Attention, x: Tensor, tables: tuple[Tensor, Tensor] | None) -> Projected:
    def heads(parameters: Linear, count: int) -> Tensor:  # [B, S, hidden] -> [B, count, S, width]
        return linear(parameters, x).unflatten(-1, (count, -1)).transpose(1, 2)

    query, key = heads(attention.q, attention.num_heads), heads(attention.k, attention.key_heads)
    value = heads(attention.v, attention.num_kv_heads)
    if attention.q_norm is not None and attention.k_norm is not None:
        query, key = norm(attention.q_norm, query), norm(attention.k_norm, key)
    if attention.position != "rope":
        return Projected(query, key, query, key, value)
    assert tables is not None
    if attention.frequencies is not None:
        assert attention.query_map is not None
        query, tables = query @ attention.query_map, _chosen(tables, attention.frequencies)
    return Projected(query, key, rotate(query, tables), rotate(key, tables), value)


def map_queries(attention: Attention, query: Tensor) -> Tensor:
    """Rotated queries [B, Hq, S, head_dim] to the width of the cached keys."""
    return (
        query
        if attention.query_map is None or attention.frequencies is not None
        else query @ attention.query_map
    )


def map_keys(attention: Attention, key: Tensor) -> Tensor:
    """Rotated keys [B, key_heads, S, head_dim] to what is cached, [B, Hkv, S, key_dim]."""
    if attention.key_map is None:
        return key
    grouped = (
        key.unflatten(1, (attention.num_kv_heads, -1)).transpose(2, 3).flatten(3)
    )  # [B, Hkv, S, t·head_dim]
    return grouped @ attention.key_map


def visibility(attention: Attention, positions: Tensor, held: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores, [B, Hq or 1, S, slots]: -inf where a slot is unseen, and ALiBi.

    `held` says which position each slot holds, [slots], or [B, Hkv, slots] where heads differ; -1: none. A query at
    position p sees those n <= p (within its window).
    """
    if held.ndim > 1:
        held = held.repeat_interleave(attention.queries_per_kv_head, 1)[:, :, None]
    distance = positions[:, None, :, None] - held  # [B, Hq or 1, S, slots]
    hidden = (distance < 0) | (held < 0)
    if attention.window is not None:
        hidden |= distance >= attention.window
    bias = torch.zeros((), dtype=dtype)
    if attention.alibi_slopes is not None:
        wide = torch.float64 if dtype == torch.float64 else torch.float32  # distances are not exact in less
        bias = (-attention.alibi_slopes[:, None, None].to(wide) * distance).to(dtype)
    return torch.where(hidden, torch.tensor(-torch.inf, dtype=dtype), bias)


def scores(attention: Attention, query: Tensor, key: Tensor) -> Tensor:
    """Scaled dot products [B, Hq, S, C] of mapped queries and cached keys [B, Hkv, C, key_dim]."""
    grouped = query.unflatten(1, (attention.num_kv_heads, -1))  # [B, Hkv, G, S, key_dim]
    return (grouped @ key[:, :, None].transpose(-1, -2)).flatten(1, 2) * attention.scale


def weights(logits: Tensor) -> Tensor:
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.softmax(logits, dim=-1, dtype=wide).to(logits.dtype)


def mix(attention: Attention, probabilities: Tensor, value: Tensor) -> Tensor:
    """Head outputs, ready for `o`: probabilities [B, Hq, S, C] and values [B, Hkv, C, value_dim] to [B, S, Hq·width]."""
    grouped = probabilities.unflatten(1, (attention.num_kv_heads, -1)) @ value[:, :, None]
    mixed = grouped.flatten(1, 2)  # [B, Hq, S, value_dim]
    if attention.value_map is not None:
        mixed = mixed @ attention.value_map
    return mixed.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class LayerCache:
    """The cached heads of one layer: key [B, Hkv, C, key_dim], value [B, Hkv, C, value_dim]."""

    key: Tensor
    value: Tensor

    @property
    def positions(self) -> Tensor:
        """Of the token in each slot."""
        return torch.arange(self.key.shape[2])

    def write(self, key: Tensor, value: Tensor, positions: Tensor) -> None:
        """Put tokens at `positions` [B, S] into the slots of the same numbers: [B, Hkv, S, key_dim and value_dim]."""
        rows = torch.arange(len(key))[:, None]
        self.key[rows, :, positions] = key.transpose(1, 2)
        self.value[rows, :, positions] = value.transpose(1, 2)


Cache = LayerCache | EvictingCache


@dataclass(frozen=True)
class LayerTaps:
    """What validation compares: the new tokens' cached key and value, attention output, residual stream."""

    key: Tensor  # [B, Hkv, S, key_dim]
    value: Tensor  # [B, Hkv, S, value_dim]
    attention: Tensor  # [B, S, hidden], after o
    residual: Tensor  # [B, S, hidden], after the layer


def head_outputs(
    attention: Attention, x: Tensor, positions: Tensor, rope: Rope | None, cache: Cache | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Concatenated head outputs before `o` [B, S, Hq·width], and the new key and value that were cached.

    `x` is the normed input [B, S, hidden] of tokens at `positions` [B, S]. With a cache, they are written
    in place and attended with all that it holds; without one, `positions` must be
    0..S-1 and the tokens attend to each other.
    """
    tables = rotary_tables(rope, positions, x.dtype) if rope is not None else None
    projected = project(attention, x, tables)
    query, key = map_queries(attention, projected.query_rotated), map_keys(attention, projected.key_rotated)
    all_keys, all_values, held = key, projected.value, torch.arange(x.shape[1])
    if cache is not None:
        cache.write(key, projected.value, positions)
        all_keys, all_values, held = cache.key, cache.value, cache.positions
    bias = visibility(attention, positions, held, x.dtype)
    return (
        mix(attention, weights(scores(attention, query, all_keys) + bias), all_values),
        key,
        projected.value,
    )


def run_layer(
    layer: Layer, x: Tensor, positions: Tensor, rope: Rope | None, cache: Cache | None = None
) -> LayerTaps:
    """One layer on the residual stream `x` [B, S, hidden]; see `head_outputs` for positions and cache."""
    mixed, key, value = head_outputs(layer.attention, norm(layer.attention_norm, x), positions, rope, cache)
    attended = linear(layer.attention.o, mixed)
    x = x + attended
    return LayerTaps(key, value, attended, x + mlp(layer.mlp, norm(layer.mlp_norm, x)))


def embed(embedding: Embedding, input_ids: Tensor) -> Tensor:
    x = F.embedding(input_ids, embedding.weight)
    return x if embedding.norm is None else norm(embedding.norm, x)


def logits(decoder: Decoder, x: Tensor) -> Tensor:
    """Residual stream after the last layer [..., hidden] to logits [..., vocab]."""
    return linear(decoder.output, norm(decoder.final_norm, x))


def new_cache(
    layers: Sequence[Layer], batch: int, capacity: int, dtype: torch.dtype, eviction: Eviction | None = None
) -> list[Cache]:
    """Empty caches, one a layer; with `eviction`, those of the layers that evict hold its budget, the others the capacity."""

    def new(index: int, attention: Attention) -> Cache:
        heads, widths = attention.num_kv_heads, (attention.key_dim, attention.value_dim)
        if eviction is not None and eviction.evicts(index):
            return EvictingCache.empty(
                batch, heads, widths, dtype, eviction, index, capacity, attention.window
            )
        return LayerCache(*(torch.zeros(batch, heads, capacity, width, dtype=dtype) for width in widths))

    return [new(index, layer.attention) for index, layer in enumerate(layers)]


@torch.no_grad()
def forward(
    decoder: Decoder,
    input_ids: Tensor,
    positions: Tensor | None = None,
    cache: Sequence[Cache] | None = None,
    taps: list[LayerTaps] | None = None,
) -> Tensor:
    """Logits [B, S, vocab] of token ids [B, S]; `taps`, if given, receives one entry a layer."""
    if positions is None:
        positions = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
    x = embed(decoder.embedding, input_ids)
    for index, layer in enumerate(decoder.layers):
        seen = run_layer(layer, x, positions, decoder.rope, None if cache is None else cache[index])
        x = seen.residual
        if taps is not None:
            taps.append(seen)
    return logits(decoder, x)
