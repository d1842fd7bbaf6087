"""The reference model: the neutral decoder in plain PyTorch with a static cache.

Calibration and conversion run it layer by layer; the exported graph is validated against it. It computes in
the dtype of the given tensors, norms and softmax in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from kvexport.eviction.config import Eviction
from kvexport.eviction.reference_cache import EvictingCache
from kvexport.model.decoder import Attention, Decoder, Embedding, Layer, Linear, Mlp, Norm
from kvexport.model.rotation import rotary_tables, rotate, select


def linear(parameters: Linear, x: Tensor) -> Tensor:
    """x [..., in] to [..., out]."""
    return F.linear(x, parameters.weight, parameters.bias)


def norm(parameters: Norm, x: Tensor) -> Tensor:
    """RMSNorm or LayerNorm over the last axis of x [..., width], computed in float32 or wider."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    weight, bias = parameters.weight, parameters.bias
    if parameters.kind == "rms":
        normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + parameters.eps)).to(x.dtype)
        return normed if weight is None else weight * normed
    if weight is not None and weight.ndim > 1:  # one for each head
        assert bias is None
        return weight * norm(replace(parameters, weight=None), x)
    weight, bias = (None if part is None else part.to(wide) for part in (weight, bias))
    return F.layer_norm(wide, (x.shape[-1],), weight, bias, parameters.eps).to(x.dtype)


def normed(parameters: Norm | None, x: Tensor) -> Tensor:
    """`norm`, or x where there is no norm."""
    return x if parameters is None else norm(parameters, x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
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


@dataclass(frozen=True)
class BlockOutput:
    """What a block made of its input; both [B, S, hidden]."""

    attention: Tensor  # what attention added to the residual stream
    residual: Tensor  # the residual stream after the block


def run_block(
    layer: Layer,
    x: Tensor,
    attend: Callable[[Tensor], Tensor],
    feed: Callable[[Mlp, Tensor], Tensor] = mlp,
) -> BlockOutput:
    """Run one block, whose equation is that of `Layer`.

    Args:
        layer: the block.
        x: residual stream before it, [B, S, hidden].
        attend: computes the attention's output after `o` from its normed input; both [B, S, hidden].
        feed: computes the MLP's output; as `mlp`.
    """
    multiplier = layer.residual_multiplier
    inner = normed(layer.attention_norm, x)
    attended = normed(layer.attention_output_norm, attend(inner))
    attended = attended if multiplier == 1 else attended * multiplier
    after = normed(layer.attention_residual_norm, x + attended)
    if not layer.parallel:
        inner = normed(layer.mlp_norm, after)
    elif layer.mlp_norm is not None:
        inner = norm(layer.mlp_norm, x)
    update = normed(layer.mlp_output_norm, feed(layer.mlp, inner))
    update = update if multiplier == 1 else update * multiplier
    return BlockOutput(attended, normed(layer.mlp_residual_norm, after + update))


@dataclass(frozen=True)
class Projected:
    """Queries, keys and values of one layer, [B, heads, S, width], before any map that follows RoPE.

    Values are those that are cached. With `norm_after_rotation`, `query` and `key` are divided by their RMS,
    and the weights of the norms are in `query_rotated` and `key_rotated`.
    """

    query: Tensor  # after QK-norm, before RoPE
    key: Tensor  # after QK-norm, before RoPE
    query_rotated: Tensor  # the same tensor as `query` without RoPE
    key_rotated: Tensor
    value: Tensor


def project(attention: Attention, x: Tensor, positions: Tensor) -> Projected:
    """Queries, keys and values of normed inputs x [B, S, hidden] at int64 positions [B or 1, S]."""
    late = attention.norm_after_rotation and attention.rope is not None

    def flat(parameters: Linear) -> Tensor:
        projected = linear(parameters, x)
        return projected if attention.clip is None else projected.clamp(-attention.clip, attention.clip)

    def heads(x: Tensor, count: int) -> Tensor:  # [B, S, count·width] -> [B, count, S, width]
        return x.unflatten(-1, (count, -1)).transpose(1, 2)

    def normed_heads(parameters: Linear, count: int, head_norm: Norm | None) -> Tensor:
        projected = flat(parameters)
        if head_norm is not None and attention.norm_over == "heads":
            projected, head_norm = norm(head_norm, projected), None
        by_head = projected.unflatten(-1, (count, -1))
        return normed(None if late else head_norm, by_head).transpose(1, 2)

    query = normed_heads(attention.q, attention.num_heads, attention.q_norm)
    key = normed_heads(attention.k, attention.key_heads, attention.k_norm)
    value = heads(flat(attention.v), attention.value_heads)
    if attention.value_encoder is not None:
        value = _join_groups(value, attention.num_kv_heads) @ attention.value_encoder
    if attention.rope is None:
        return Projected(query, key, query, key, value)
    tables = rotary_tables(attention.rope, positions, x.dtype)
    if attention.frequencies is not None:
        assert attention.query_map is not None
        query, tables = query @ attention.query_map, select(tables, attention.frequencies)
    query_rotated, key_rotated = rotate(query, tables), rotate(key, tables)
    if late:
        assert attention.q_norm is not None and attention.k_norm is not None
        query_rotated, key_rotated = (
            norm(attention.q_norm, query_rotated),
            norm(attention.k_norm, key_rotated),
        )
        query = norm(replace(attention.q_norm, weight=None), query)  # rotation keeps the RMS
        key = norm(replace(attention.k_norm, weight=None), key)
    return Projected(query, key, query_rotated, key_rotated, value)


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
    return _join_groups(key, attention.num_kv_heads) @ attention.key_map


def _join_groups(heads: Tensor, groups: int) -> Tensor:
    """[B, groups·t, S, width] to [B, groups, S, t·width]."""
    return heads.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3)


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
    bias = torch.zeros((), dtype=dtype, device=distance.device)
    if attention.alibi_slopes is not None:
        wide = (
            torch.float64 if dtype == torch.float64 else torch.float32
        )  # narrower dtypes do not hold distances exactly
        bias = (-attention.alibi_slopes[:, None, None].to(wide) * distance).to(dtype)
    return torch.where(hidden, bias.new_full((), -torch.inf), bias)


def scores(attention: Attention, query: Tensor, key: Tensor) -> Tensor:
    """Scaled and capped products [B, H, S, C] of mapped queries and cached keys.

    Queries are [B, H, S, key_dim], keys [B, Hkv, C, key_dim].
    """
    rows = _rows_of_group(query, attention.num_kv_heads)
    scaled = (rows @ key.transpose(-1, -2)).reshape(*query.shape[:3], -1) * attention.scale
    return capped(scaled, attention.softcap)


def capped(x: Tensor, softcap: float | None) -> Tensor:
    """softcap · tanh(x / softcap), which bounds x smoothly; x itself without a softcap."""
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def weights(logits: Tensor) -> Tensor:
    """Softmax over the last axis, computed in float32 or wider."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.softmax(logits, dim=-1, dtype=wide).to(logits.dtype)


def mix(attention: Attention, probabilities: Tensor, value: Tensor) -> Tensor:
    """Head outputs [B, S, H·width] of probabilities [B, H, S, C] and values [B, Hkv, C, value_dim]."""
    rows = _rows_of_group(probabilities, attention.num_kv_heads)
    mixed = (rows @ value).reshape(*probabilities.shape[:3], -1)  # [B, H, S, value_dim]
    if attention.value_map is not None:
        mixed = mixed @ attention.value_map
    return mixed.transpose(1, 2).flatten(2)


def _rows_of_group(x: Tensor, groups: int) -> Tensor:
    """[B, groups·G, S, n] as [B, groups, G·S, n]: a product with a cached head then reads it once for all of
    its query heads; a broadcast product would copy it for each of them.
    """
    return x.reshape(len(x), groups, -1, x.shape[-1])


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
        return torch.arange(self.key.shape[2], device=self.key.device)

    def write(self, key: Tensor, value: Tensor, positions: Tensor) -> None:
        """Write key [B, Hkv, S, key_dim] and value [B, Hkv, S, value_dim] to the slots `positions` [B, S]."""
        rows = torch.arange(len(key), device=key.device)[:, None]
        self.key[rows, :, positions] = key.transpose(1, 2)
        self.value[rows, :, positions] = value.transpose(1, 2)


Cache = LayerCache | EvictingCache


@dataclass(frozen=True)
class LayerTaps:
    """Intermediate results of one layer for the new tokens, which validation compares."""

    key: Tensor  # [B, Hkv, S, key_dim]
    value: Tensor  # [B, Hkv, S, value_dim]
    attention: Tensor  # [B, S, hidden], what attention adds to the residual stream
    residual: Tensor  # [B, S, hidden], after the layer


def head_outputs(
    attention: Attention, x: Tensor, positions: Tensor, cache: Cache | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention before the output projection.

    Args:
        attention: the layer's attention.
        x: normed input of the new tokens, [B, S, hidden].
        positions: their positions, [B, S] int64; without a cache they must be 0 .. S - 1.
        cache: the new keys and values are written into it in place, and queries attend to all of its tokens;
            None: the new tokens attend to each other.

    Returns:
        Concatenated head outputs [B, S, H·width], new keys [B, Hkv, S, key_dim], new values [B, Hkv, S,
        value_dim].
    """
    projected = project(attention, x, positions)
    query, key = map_queries(attention, projected.query_rotated), map_keys(attention, projected.key_rotated)
    all_keys, all_values, slots = key, projected.value, torch.arange(x.shape[1], device=x.device)
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
    layer: Layer,
    x: Tensor,
    positions: Tensor,
    cache: Cache | None = None,
    feed: Callable[[Mlp, Tensor], Tensor] = mlp,
) -> LayerTaps:
    """Run one layer on the residual stream x [B, S, hidden].

    `positions` and `cache` are as in `head_outputs`, `feed` as in `run_block`.
    """
    new: dict[str, Tensor] = {}

    def attend(inner: Tensor) -> Tensor:
        mixed, new["key"], new["value"] = head_outputs(layer.attention, inner, positions, cache)
        return linear(layer.attention.o, mixed)

    output = run_block(layer, x, attend, feed)
    return LayerTaps(new["key"], new["value"], output.attention, output.residual)


def embed(embedding: Embedding, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """The residual stream before the first layer, [B, S, hidden].

    Args:
        embedding: the model's embedding.
        input_ids: token ids, [B, S] int64, on any device.
        positions: [B or 1, S] int64, on any device [default: 0 .. S - 1].
    """
    x = F.embedding(input_ids.to(embedding.weight.device), embedding.weight)
    if embedding.multiplier != 1:
        x = x * embedding.multiplier
    if embedding.projection is not None:
        x = linear(embedding.projection, x)
    if embedding.positions is not None:
        at = torch.arange(input_ids.shape[1])[None] if positions is None else positions
        x = x + F.embedding(at.to(x.device), embedding.positions)
    return normed(embedding.norm, x)


def head_inputs(decoder: Decoder, x: Tensor) -> Tensor:
    """Inputs of the head [..., width], of a residual stream after the last layer [..., hidden]."""
    x = normed(decoder.final_norm, x)
    return x if decoder.output_projection is None else linear(decoder.output_projection, x)


def logits(decoder: Decoder, x: Tensor) -> Tensor:
    """Logits [..., vocab] of a residual stream after the last layer [..., hidden]."""
    found = linear(decoder.output, head_inputs(decoder, x))
    if decoder.logit_multiplier != 1:
        found = found * decoder.logit_multiplier
    return capped(found, decoder.logit_softcap)


def new_cache(
    layers: Sequence[Layer], batch: int, capacity: int, dtype: torch.dtype, eviction: Eviction | None = None
) -> list[Cache]:
    """Empty caches, one per layer: with the budget of `eviction` in the layers that evict, else with
    `capacity` slots on the device of the layer.
    """

    def new(index: int, attention: Attention) -> Cache:
        heads, widths = attention.num_kv_heads, (attention.key_dim, attention.value_dim)
        if eviction is not None and eviction.evicts(index):
            return EvictingCache.empty(
                batch, heads, widths, dtype, eviction, index, capacity, attention.window
            )
        shapes = [(batch, heads, capacity, width) for width in widths]
        device = attention.k.weight.device
        return LayerCache(*(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes))

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
        input_ids: token ids, [B, S] int64, on any device.
        positions: [B, S] int64, on any device [default: 0 .. S - 1].
        cache: one cache per layer, as `new_cache` makes them; None: no cache.
        taps: receives one entry per layer.

    Returns:
        Logits [B, S, vocab].
    """
    if positions is None:
        positions = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
    x = embed(decoder.embedding, input_ids, positions)
    positions = positions.to(x.device)
    for index, layer in enumerate(decoder.layers):
        layer_taps = run_layer(layer, x, positions, None if cache is None else cache[index])
        x = layer_taps.residual
        if taps is not None:
            taps.append(layer_taps)
    return logits(decoder, x)
