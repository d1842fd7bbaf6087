"""Attention of one layer over its cache, as nodes: project, normalise, rotate, map, write, attend, project.

Knows `kvexport.model.reference.head_outputs`, its oracle, in operators that TensorRT's parser imports as native
layers; must not know what stands around it in the layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kvexport.bundle.graph_io import attention_tap, present
from kvexport.graph.blocks import linear, norm
from kvexport.graph.eviction_attention import EvictionAttentionBuilder, EvictionCacheValues, EvictionInputs
from kvexport.graph.masks import Masks
from kvexport.graph.nodes import NodeBuilder, sizes
from kvexport.graph.rotary import Rotary
from kvexport.model.decoder import Attention, Linear, Norm


@dataclass(frozen=True)
class SharedInputs:
    """What the layers share: where the new tokens are written, what they see, how they are rotated."""

    write_indices: ir.Value  # [batch], of layers that do not evict
    masks: Masks | None  # of those
    evicting: EvictionInputs | None  # of the others
    rotary: Rotary | None


@dataclass(frozen=True)
class CacheValues:
    """Keys [batch, kv_heads, capacity, key_dim] and values [batch, kv_heads, capacity, value_dim] of a layer."""

    key: ir.Value
    value: ir.Value


class AttentionBuilder:
    """Writes the attention of layer `index`."""

    def __init__(self, nodes: NodeBuilder, index: int, attention: Attention, tokens: SharedInputs) -> None:
        self._nodes, self._index, self._attention, self._tokens = nodes, index, attention, tokens
        self._name = f"layers.{index}.attention"

    def add(
        self, x: ir.Value, cache: CacheValues | EvictionCacheValues
    ) -> tuple[ir.Value, CacheValues | EvictionCacheValues]:
        """Normed input [batch, sequence, hidden] to what attention adds to the residual stream, and the written cache."""
        attention, nodes, name = self._attention, self._nodes, self._name
        query = self._positioned("q", attention.q, attention.num_heads, attention.q_norm, x)
        if attention.frequencies is None:
            query = self._map_queries(query)
        key = self._map_keys(self._positioned("k", attention.k, attention.key_heads, attention.k_norm, x))
        value = self._by_head("v", self._heads("v", attention.v, attention.num_kv_heads, x))
        written: CacheValues | EvictionCacheValues
        if isinstance(cache, EvictionCacheValues):
            assert self._tokens.evicting is not None
            evicting = EvictionAttentionBuilder(self._tokens.evicting, self._index, attention, name)
            mixed, written = evicting.add(query, key, value, cache)
        else:
            written = CacheValues(
                self._write("key", cache.key, key), self._write("value", cache.value, value)
            )
            shape = (*sizes(query)[:3], attention.value_dim)
            inputs = (query, written.key, written.value, self._mask())
            mixed = nodes.op("Attention", *inputs, name=f"{name}.mixed", shape=shape, scale=attention.scale)
        if attention.value_map is not None:  # [heads, value_dim, width]
            value_map = nodes.weight(f"{name}.value_map", np.asarray(attention.value_map))
            shape = (*sizes(mixed)[:3], attention.value_map.shape[2])
            mixed = nodes.op("MatMul", mixed, value_map, name=f"{name}.mixed.mapped", shape=shape)
        return linear(nodes, attention.o, self._join(mixed), f"{name}.o", attention_tap(self._index)), written

    def _heads(self, which: str, parameters: Linear, count: int, x: ir.Value) -> ir.Value:
        """[batch, sequence, hidden] to [batch, sequence, count, width]."""
        flat, width = (
            linear(self._nodes, parameters, x, f"{self._name}.{which}"),
            parameters.weight.shape[0] // count,
        )
        shape = (*sizes(flat)[:2], count, width)
        return self._nodes.op(
            "Reshape",
            flat,
            self._nodes.integers(0, 0, count, width),
            name=f"{self._name}.{which}.heads",
            shape=shape,
        )

    def _by_head(self, which: str, x: ir.Value) -> ir.Value:
        """[batch, sequence, count, width] to [batch, count, sequence, width]."""
        batch, sequence, count, width = sizes(x)
        shape = (batch, count, sequence, width)
        return self._nodes.op(
            "Transpose", x, name=f"{self._name}.{which}.by_head", shape=shape, perm=[0, 2, 1, 3]
        )

    def _positioned(
        self, which: str, parameters: Linear, count: int, norm_of: Norm | None, x: ir.Value
    ) -> ir.Value:
        """Queries or keys before any map that follows rotation, normalised and rotated: [batch, count, sequence, width]."""
        heads = self._heads(which, parameters, count, x)
        if norm_of is not None:
            heads = norm(self._nodes, norm_of, heads, f"{self._name}.{which}_norm")
        heads = self._by_head(which, heads)
        if self._attention.position != "rope":
            return heads
        assert self._tokens.rotary is not None, "a layer that rotates needs the decoder's rotary frequencies"
        frequencies = self._attention.frequencies
        if frequencies is not None and which == "q":
            heads = self._map_queries(heads)
        chosen = None if frequencies is None else np.asarray(frequencies)
        return self._tokens.rotary.rotate(heads, f"{self._name}.{which}.rotated", chosen)

    def _map_queries(self, query: ir.Value) -> ir.Value:
        """[batch, heads, sequence, head_dim] to [batch, heads, sequence, key_dim], as they are without a map."""
        if self._attention.query_map is None:
            return query
        query_map = self._nodes.weight(f"{self._name}.query_map", np.asarray(self._attention.query_map))
        shape = (*sizes(query)[:3], self._attention.key_dim)
        return self._nodes.op("MatMul", query, query_map, name=f"{self._name}.q.mapped", shape=shape)

    def _map_keys(self, key: ir.Value) -> ir.Value:
        """[batch, t·kv_heads, sequence, head_dim] to [batch, kv_heads, sequence, key_dim], t neighbours into one."""
        attention, nodes, name = self._attention, self._nodes, f"{self._name}.k"
        if attention.key_map is None:
            return key
        batch, _, sequence, width = sizes(key)
        kv_heads, group = attention.num_kv_heads, attention.key_heads // attention.num_kv_heads
        if group > 1:
            to = nodes.integers(0, kv_heads, group, -1, attention.head_dim)
            key = nodes.op(
                "Reshape", key, to, name=f"{name}.groups", shape=(batch, kv_heads, group, sequence, width)
            )
            turned = (batch, kv_heads, sequence, group, width)
            key = nodes.op("Transpose", key, name=f"{name}.by_group", shape=turned, perm=[0, 1, 3, 2, 4])
            joined = group * attention.head_dim
            to = nodes.integers(0, 0, 0, joined)
            key = nodes.op(
                "Reshape", key, to, name=f"{name}.joined", shape=(batch, kv_heads, sequence, joined)
            )
        key_map = nodes.weight(
            f"{self._name}.key_map", np.asarray(attention.key_map)
        )  # [kv_heads, t·head_dim, key_dim]
        shape = (batch, kv_heads, sequence, attention.key_dim)
        return nodes.op("MatMul", key, key_map, name=f"{name}.mapped", shape=shape)

    def _write(self, which: str, cache: ir.Value, new: ir.Value) -> ir.Value:
        """The cache with `new` in its slots: the same buffer, where the caller binds input and output to one."""
        inputs = (cache, new, self._tokens.write_indices)
        return self._nodes.op(
            "TensorScatter", *inputs, name=present(self._index, which), axis=-2, mode="linear"
        )

    def _mask(self) -> ir.Value:
        attention, masks = self._attention, self._tokens.masks
        assert masks is not None
        if attention.alibi_slopes is None:
            return masks.visible(attention.window)
        return masks.bias(
            attention.window, np.asarray(attention.alibi_slopes).astype(np.float32), f"{self._name}.alibi"
        )

    def _join(self, mixed: ir.Value) -> ir.Value:
        """[batch, heads, sequence, width] to [batch, sequence, heads·width]."""
        nodes, (batch, heads, sequence, width) = self._nodes, sizes(mixed)
        joined = self._attention.o.weight.shape[1]
        shape = (batch, sequence, heads, width)
        by_token = nodes.op("Transpose", mixed, name=f"{self._name}.by_token", shape=shape, perm=[0, 2, 1, 3])
        to = nodes.integers(0, 0, joined)
        return nodes.op("Reshape", by_token, to, name=f"{self._name}.joined", shape=(batch, sequence, joined))
