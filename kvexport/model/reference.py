"""The reference model: the neutral decoder in plain PyTorch with a static cache.

Calibration and conversion run it layer by layer; the exported graph is validated against it. It computes in
the dtype of the given tensors, norms and softmax in float32 or wider.
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
    """x [..., in] to [..., out]."""
    return F.linear(x, parameters.weight, parameters.bias)


def norm(parameters: Norm, x: Tensor) -> Tensor:
    """RMSNorm or LayerNorm over the last axis of x [..., width], computed in float32 or wider."""
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
    """Input of the down projection, [..., intermediate]."""
    activation = ACTIVATIONS[parameters.activation]
    if parameters.gate is None:
        return activation(linear(parameters.up, x))
    return activation(linear(parameters.gate, x)) * linear(parameters.up, x)


def mlp(parameters: Mlp, x: Tensor) -> Tensor:
    """MLP of normed inputs x [..., hidden]."""
    return linear(parameters.down, mlp_inner(parameters, x))


def rotary_tables(rope: Rope, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [B, 1, S, head_dim/2], of int64 positions [B, S].

    Angles are float32 products for every `dtype`, as in the models' training.
    """
    angles = positions[:, None, :, None].float() * rope.inv_freq.float()
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE (arXiv 2104.09864) on x [B, H, S, head_dim] with half-split pairs."""
    cos, sin = tables
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _select(tables: tuple[Tensor, Tensor], frequencies: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = tables
    return cos[..., frequencies], sin[..., frequencies]


@dataclass(frozen=True)
class Projected:
    """Queries, keys and values of one layer, before any map that follows RoPE; all [B, heads, S, width]."""

    query: Tensor  # after QK-norm, before RoPE
    key: Tensor  # after QK-norm, before RoPE
    query_rotated: Tensor  # the same tensor as `query` without RoPE
    key_rotated: Tensor
    value: Tensor


def project(attention: Attention, x: Tensor, tables: tuple[Tensor, Tensor] | None) -> Projected:
    """Queries, keys and values of normed inputs x [B, S, hidden]; `tables` are those of `rotary_tables`."""

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
        query, tables = query @ attention.query_map, _select(tables, attention.frequencies)
    return Projected(query, key, rotate(query, tables), rotate(key, tables), value)


def map_queries(attention: Attention, query: Tensor) -> Tensor:
    """Queries after RoPE [B, H, S, head_dim] mapped to the width of cached keys, [B, H, S, key_dim]."""
    return (
        query
        if attention.query_map is None or attention.frequencies is not None
        else query @ attention.query_map
    )


def map_keys(attention: Attention, key: Tensor) -> Tensor:
    """Keys after RoPE [B, key_heads, S, head_dim] mapped to cached keys, [B, Hkv, S, key_dim]."""
    if attention.key_map is None:
        return key
    grouped = (
        key.unflatten(1, (attention.num_kv_heads, -1)).transpose(2, 3).flatten(3)
    )  # [B, Hkv, S, t·head_dim]
    return grouped @ attention.key_map


def visibility(attention: Attention, positions: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention bias, [B, H or 1, S, slots]: -inf where a query does not see a slot, plus ALiBi.

    Args:
        attention: gives the window and the ALiBi slopes.
        positions: positions of the queries, [B, S] int64; a query at p sees positions n <= p within its
            window.
        slots: position of the token in each slot, [slots], or [B, Hkv, slots] if heads differ; -1: empty.
        dtype: data type of the result.
    """
    if slots.ndim > 1:
        slots = slots.repeat_interleave(attention.queries_per_kv_head, 1)[:, :, None]
    distance = positions[:, None, :, None] - slots  # [B, Hq or 1, S, slots]
    hidden = (distance < 0) | (slots < 0)
    if attention.window is not None:
        hidden |= distance >= attention.window
    bias = torch.zeros((), dtype=dtype)
    if attention.alibi_slopes is not None:
        wide = (
            torch.float64 if dtype == torch.float64 else torch.float32
        )  # narrower dtypes do not hold distances exactly
        bias = (-attention.alibi_slopes[:, None, None].to(wide) * distance).to(dtype)
    return torch.where(hidden, torch.tensor(-torch.inf, dtype=dtype), bias)


def scores(attention: Attention, query: Tensor, key: Tensor) -> Tensor:
    """Scaled dot products [B, H, S, C] of mapped queries [B, H, S, key_dim] and cached keys [B, Hkv, C,
    key_dim].
    """
    grouped = query.unflatten(1, (attention.num_kv_heads, -1))  # [B, Hkv, G, S, key_dim]
    return (grouped @ key[:, :, None].transpose(-1, -2)).flatten(1, 2) * attention.scale


def weights(logits: Tensor) -> Tensor:
    """Softmax over the last axis, computed in float32 or wider."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.softmax(logits, dim=-1, dtype=wide).to(logits.dtype)


def mix(attention: Attention, probabilities: Tensor, value: Tensor) -> Tensor:
    """Head outputs [B, S, H·width] of probabilities [B, H, S, C] and values [B, Hkv, C, value_dim]."""
    grouped = probabilities.unflatten(1, (attention.num_kv_heads, -1)) @ value[:, :, None]
    mixed = grouped.flatten(1, 2)  # [B, H, S, value_dim]
    if attention.value_map is not None:
        mixed = mixed @ attention.value_map
    return mixed.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class LayerCache:
    """Static cache of one layer with C slots.

    Attributes:
        key: [B, Hkv, C, key_dim].
        value: [B, Hkv, C, value_dim].
    """

    key: Tensor
    value: Tensor

    @property
    def positions(self) -> Tensor:
        """Position of the token in each slot, [C]."""
        return torch.arange(self.key.shape[2])

    def write(self, key: Tensor, value: Tensor, positions: Tensor) -> None:
        """Write key [B, Hkv, S, key_dim] and value [B, Hkv, S, value_dim] to the slots `positions` [B, S]."""
        rows = torch.arange(len(key))[:, None]
        self.key[rows, :, positions] = key.transpose(1, 2)
        self.value[rows, :, positions] = value.transpose(1, 2)


Cache = LayerCache | EvictingCache


@dataclass(frozen=True)
class LayerTaps:
    """Intermediate results of one layer for the new tokens, which validation compares."""

    key: Tensor  # [B, Hkv, S, key_dim]
    value: Tensor  # [B, Hkv, S, value_dim]
    attention: Tensor  # [B, S, hidden], after o
    residual: Tensor  # [B, S, hidden], after the layer


def head_outputs(
    attention: Attention, x: Tensor, positions: Tensor, rope: Rope | None, cache: Cache | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention before the output projection.

    Args:
        attention: the layer's attention.
        x: normed input of the new tokens, [B, S, hidden].
        positions: their positions, [B, S] int64; without a cache they must be 0 .. S - 1.
        rope: the model's RoPE; None: the model has none.
        cache: the new keys and values are written into it in place, and queries attend to all of its tokens;
            None: the new tokens attend to each other.

    Returns:
        Concatenated head outputs [B, S, H·width], new keys [B, Hkv, S, key_dim], new values [B, Hkv, S,
        value_dim].
    """
    tables = rotary_tables(rope, positions, x.dtype) if rope is not None else None
    projected = project(attention, x, tables)
    query, key = map_queries(attention, projected.query_rotated), map_keys(attention, projected.key_rotated)
    all_keys, all_values, slots = key, projected.value, torch.arange(x.shape[1])
    if cache is not None:
        cache.write(key, projected.value, positions)
        all_keys, all_values, slots = cache.key, cache.value, cache.positions
    bias = visibility(attention, positions, slots, x.dtype)
    return (
        mix(attention, weights(scores(attention, query, all_keys) + bias), all_values),
        key,
        projected.value,
    )


def run_layer(
    layer: Layer, x: Tensor, positions: Tensor, rope: Rope | None, cache: Cache | None = None
) -> LayerTaps:
    """Run one layer on the residual stream x [B, S, hidden]; positions and cache as in `head_outputs`."""
    mixed, key, value = head_outputs(layer.attention, norm(layer.attention_norm, x), positions, rope, cache)
    attended = linear(layer.attention.o, mixed)
    x = x + attended
    return LayerTaps(key, value, attended, x + mlp(layer.mlp, norm(layer.mlp_norm, x)))


def embed(embedding: Embedding, input_ids: Tensor) -> Tensor:
    """Token ids [B, S] to the residual stream before the first layer, [B, S, hidden]."""
    x = F.embedding(input_ids, embedding.weight)
    return x if embedding.norm is None else norm(embedding.norm, x)


def logits(decoder: Decoder, x: Tensor) -> Tensor:
    """Logits [..., vocab] of a residual stream after the last layer [..., hidden]."""
    return linear(decoder.output, norm(decoder.final_norm, x))


def new_cache(
    layers: Sequence[Layer], batch: int, capacity: int, dtype: torch.dtype, eviction: Eviction | None = None
) -> list[Cache]:
    """Empty caches, one per layer: with the budget of `eviction` in the layers that evict, else with
    `capacity` slots.
    """

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
    """Run the whole model.

    Args:
        decoder: the model.
        input_ids: token ids, [B, S] int64.
        positions: [B, S] int64 [default: 0 .. S - 1].
        cache: one cache per layer, as `new_cache` makes them; None: no cache.
        taps: receives one entry per layer.

    Returns:
        Logits [B, S, vocab].
    """
    if positions is None:
        positions = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
    x = embed(decoder.embedding, input_ids)
    for index, layer in enumerate(decoder.layers):
        layer_taps = run_layer(layer, x, positions, decoder.rope, None if cache is None else cache[index])
        x = layer_taps.residual
        if taps is not None:
            taps.append(layer_taps)
    return logits(decoder, x)
