"""Attention of one layer with its KV cache, as ONNX nodes.

Project, normalise, rotate, map, write the cache, attend, project. The reference is
`kvexport.model.reference.head_outputs`. TensorRT's parser imports every operator used here as a native layer.
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
    """Values that all layers of a decoder read.

    Attributes:
        write_indices: int64 [batch], the slot of each sequence's first new token, in layers without eviction.
        masks: masks of layers without eviction; None if there are no such layers.
        eviction: values that layers with eviction share; None if there are no such layers.
        rotary: rotary tables; None for decoders without rotary positions.
    """

    write_indices: ir.Value
    masks: Masks | None
    eviction: EvictionInputs | None
    rotary: Rotary | None


@dataclass(frozen=True)
class CacheValues:
    """Cached keys and values of a layer, [batch, kv_heads, capacity, key_dim or value_dim]."""

    key: ir.Value
    value: ir.Value


class AttentionBuilder:
    """Add the attention of layer `index` to a graph."""

    def __init__(self, nodes: NodeBuilder, index: int, attention: Attention, shared: SharedInputs) -> None:
        self._nodes, self._index, self._attention, self._shared = nodes, index, attention, shared
        self._name = f"layers.{index}.attention"

    def add(
        self, x: ir.Value, cache: CacheValues | EvictionCacheValues
    ) -> tuple[ir.Value, CacheValues | EvictionCacheValues]:
        """Attention of the normalised input x [batch, sequence, hidden].

        Returns:
            the attention output [batch, sequence, hidden], and the cache with the new tokens written.
        """
        attention, nodes, name = self._attention, self._nodes, self._name
        query = self._positioned("q", attention.q, attention.num_heads, attention.q_norm, x)
        if attention.frequencies is None:
            query = self._map_queries(query)
        key = self._map_keys(self._positioned("k", attention.k, attention.key_heads, attention.k_norm, x))
        value = self._by_head("v", self._heads("v", attention.v, attention.num_kv_heads, x))
        written: CacheValues | EvictionCacheValues
        if isinstance(cache, EvictionCacheValues):
            assert self._shared.eviction is not None
            builder = EvictionAttentionBuilder(self._shared.eviction, self._index, attention, name)
            mixed, written = builder.add(query, key, value, cache)
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
        """Project x [batch, sequence, hidden] to [batch, sequence, count, width]."""
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
        """Transpose x [batch, sequence, count, width] to [batch, count, sequence, width]."""
        batch, sequence, count, width = sizes(x)
        shape = (batch, count, sequence, width)
        return self._nodes.op(
            "Transpose", x, name=f"{self._name}.{which}.by_head", shape=shape, perm=[0, 2, 1, 3]
        )

    def _positioned(
        self, which: str, parameters: Linear, count: int, head_norm: Norm | None, x: ir.Value
    ) -> ir.Value:
        """Project, normalise and rotate queries or keys: [batch, count, sequence, width].

        Maps that follow the rotation are not applied.
        """
        heads = self._heads(which, parameters, count, x)
        if head_norm is not None:
            heads = norm(self._nodes, head_norm, heads, f"{self._name}.{which}_norm")
        heads = self._by_head(which, heads)
        if self._attention.position != "rope":
            return heads
        assert self._shared.rotary is not None, (
            "a layer with rotary positions needs the decoder's rotary frequencies"
        )
        frequencies = self._attention.frequencies
        if frequencies is not None and which == "q":
            heads = self._map_queries(heads)
        columns = None if frequencies is None else np.asarray(frequencies)
        return self._shared.rotary.rotate(heads, f"{self._name}.{which}.rotated", columns)

    def _map_queries(self, query: ir.Value) -> ir.Value:
        """Map queries [batch, heads, sequence, head_dim] to [batch, heads, sequence, key_dim]; or no map."""
        if self._attention.query_map is None:
            return query
        query_map = self._nodes.weight(f"{self._name}.query_map", np.asarray(self._attention.query_map))
        shape = (*sizes(query)[:3], self._attention.key_dim)
        return self._nodes.op("MatMul", query, query_map, name=f"{self._name}.q.mapped", shape=shape)

    def _map_keys(self, key: ir.Value) -> ir.Value:
        """Map each group of t neighbouring keys to one, if there is a map.

        [batch, t·kv_heads, sequence, head_dim] to [batch, kv_heads, sequence, key_dim].
        """
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
            grouped = (batch, kv_heads, sequence, group, width)
            key = nodes.op("Transpose", key, name=f"{name}.by_group", shape=grouped, perm=[0, 1, 3, 2, 4])
            width = group * attention.head_dim
            to = nodes.integers(0, 0, 0, width)
            key = nodes.op(
                "Reshape", key, to, name=f"{name}.joined", shape=(batch, kv_heads, sequence, width)
            )
        key_map = nodes.weight(
            f"{self._name}.key_map", np.asarray(attention.key_map)
        )  # [kv_heads, t·head_dim, key_dim]
        shape = (batch, kv_heads, sequence, attention.key_dim)
        return nodes.op("MatMul", key, key_map, name=f"{name}.mapped", shape=shape)

    def _write(self, which: str, cache: ir.Value, new: ir.Value) -> ir.Value:
        """Write `new` into the cache; in place if the caller binds input and output to the same buffer."""
        inputs = (cache, new, self._shared.write_indices)
        return self._nodes.op(
            "TensorScatter", *inputs, name=present(self._index, which), axis=-2, mode="linear"
        )

    def _mask(self) -> ir.Value:
        attention, masks = self._attention, self._shared.masks
        assert masks is not None
        if attention.alibi_slopes is None:
            return masks.visible(attention.window)
        return masks.bias(
            attention.window, np.asarray(attention.alibi_slopes).astype(np.float32), f"{self._name}.alibi"
        )

    def _join(self, mixed: ir.Value) -> ir.Value:
        """Join heads: mixed [batch, heads, sequence, width] to [batch, sequence, heads·width]."""
        nodes, (batch, heads, sequence, width) = self._nodes, sizes(mixed)
        joined = self._attention.o.weight.shape[1]
        shape = (batch, sequence, heads, width)
        by_token = nodes.op("Transpose", mixed, name=f"{self._name}.by_token", shape=shape, perm=[0, 2, 1, 3])
        to = nodes.integers(0, 0, joined)
        return nodes.op("Reshape", by_token, to, name=f"{self._name}.joined", shape=(batch, sequence, joined))
