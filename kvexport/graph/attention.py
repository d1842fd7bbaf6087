"""Attention of one layer with its KV cache, as ONNX nodes.

Project, normalise, rotate, map, write the cache, attend, project. The reference is
`kvexport.model.reference.head_outputs`. TensorRT's parser imports every operator used here as a native layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from kvexport.bundle.graph_io import present
from kvexport.graph.blocks import attention_products, linear, norm
from kvexport.graph.eviction_attention import (
    EvictionAttentionBuilder,
    EvictionCacheValues,
    EvictionInputs,
)
from kvexport.graph.nodes import NodeBuilder, sizes
from kvexport.graph.rotary import RotaryTables
from kvexport.graph.slots import Slots
from kvexport.model.decoder import Attention, Linear, Norm

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SharedInputs:
    """Values that layers of a decoder share.

    Attributes:
        slots: slots of the layer's cache, and its masks; None if the layer evicts.
        eviction: values that layers with eviction share; None if there are no such layers.
        rotary: rotary tables.
    """

    slots: Slots | None
    eviction: EvictionInputs | None
    rotary: RotaryTables


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
        self, x: ir.Value, cache: CacheValues | EvictionCacheValues, result: str
    ) -> tuple[ir.Value, CacheValues | EvictionCacheValues]:
        """Attention of the normalised input x [batch, sequence, hidden].

        Returns:
            the attention output [batch, sequence, hidden], named `result`, and the cache with the new
            tokens written.
        """
        attention, nodes, name = self._attention, self._nodes, self._name
        query = self._positioned("q", attention.q, attention.num_heads, attention.q_norm, x)
        if attention.frequencies is None:
            query = self._map_queries(query)
        key = self._positioned("k", attention.k, attention.key_heads, attention.k_norm, x)
        key = self._map_groups("k", "key_map", key, attention.key_map)
        value = self._by_head("v", self._heads("v", attention.v, attention.value_heads, None, x))
        value = self._map_groups("v", "value_encoder", value, attention.value_encoder)
        written: CacheValues | EvictionCacheValues
        if isinstance(cache, EvictionCacheValues):
            assert self._shared.eviction is not None
            builder = EvictionAttentionBuilder(self._shared.eviction, self._index, attention, name)
            mixed, written = builder.add(query, key, value, cache)
        else:
            written = CacheValues(
                self._write("key", cache.key, key), self._write("value", cache.value, value)
            )
            inputs = (query, written.key, written.value, self._mask())
            mixed = attention_products(nodes, attention, *inputs, name=f"{name}.mixed")
        if attention.value_map is not None:  # [heads, value_dim, width]
            value_map = nodes.weight(f"{name}.value_map", np.asarray(attention.value_map))
            shape = (*sizes(mixed)[:3], attention.value_map.shape[2])
            mixed = nodes.op("MatMul", mixed, value_map, name=f"{name}.mixed.mapped", shape=shape)
        return linear(nodes, attention.o, self._join(mixed), f"{name}.o", result), written

    def _heads(
        self, which: str, parameters: Linear, count: int, flat_norm: Norm | None, x: ir.Value
    ) -> ir.Value:
        """Project and clip x [batch, sequence, hidden], and normalise all heads together.

        Returns:
            [batch, sequence, count, width].
        """
        name, clip = f"{self._name}.{which}", self._attention.clip
        flat = linear(self._nodes, parameters, x, name)
        if clip is not None:
            bounds = (self._nodes.number("clip.low", -clip), self._nodes.number("clip.high", clip))
            flat = self._nodes.op("Clip", flat, *bounds, name=f"{name}.clipped")
        if flat_norm is not None:
            flat = norm(self._nodes, flat_norm, flat, f"{name}_norm")
        width = parameters.weight.shape[0] // count
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
        attention, name = self._attention, f"{self._name}.{which}"
        over_all = attention.norm_over == "heads"
        heads = self._heads(which, parameters, count, head_norm if over_all else None, x)
        separate = None if over_all else head_norm
        late = attention.norm_after_rotation and attention.rope is not None
        if separate is not None and not late:
            heads = norm(self._nodes, separate, heads, f"{name}_norm")
        heads = self._by_head(which, heads)
        if attention.rope is None:
            return heads
        frequencies = attention.frequencies
        if frequencies is not None and which == "q":
            heads = self._map_queries(heads)
        columns = None if frequencies is None else np.asarray(frequencies)
        heads = self._shared.rotary.of(attention.rope).rotate(heads, f"{name}.rotated", columns)
        if separate is not None and late:
            heads = norm(self._nodes, separate, heads, f"{name}_norm")
        return heads

    def _map_queries(self, query: ir.Value) -> ir.Value:
        """Map queries [batch, heads, sequence, head_dim] to [batch, heads, sequence, key_dim]; or no map."""
        if self._attention.query_map is None:
            return query
        query_map = self._nodes.weight(f"{self._name}.query_map", np.asarray(self._attention.query_map))
        shape = (*sizes(query)[:3], self._attention.key_dim)
        return self._nodes.op("MatMul", query, query_map, name=f"{self._name}.q.mapped", shape=shape)

    def _map_groups(self, which: str, map_name: str, key: ir.Value, group_map: Tensor | None) -> ir.Value:
        """Map each group of t neighbouring keys or values to one, if there is a map.

        [batch, t·kv_heads, sequence, head_dim] to [batch, kv_heads, sequence, width], with a map [kv_heads,
        t·head_dim, width].
        """
        attention, nodes, name = self._attention, self._nodes, f"{self._name}.{which}"
        if group_map is None:
            return key
        batch, heads, sequence, width = sizes(key)
        assert isinstance(heads, int)
        kv_heads, group = attention.num_kv_heads, heads // attention.num_kv_heads
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
        weight = nodes.weight(f"{self._name}.{map_name}", np.asarray(group_map))
        shape = (batch, kv_heads, sequence, group_map.shape[2])
        return nodes.op("MatMul", key, weight, name=f"{name}.mapped", shape=shape)

    def _write(self, which: str, cache: ir.Value, new: ir.Value) -> ir.Value:
        """Write `new` into the cache; in place if the caller binds input and output to the same buffer."""
        assert self._shared.slots is not None
        inputs = (cache, new, self._shared.slots.write_indices)
        return self._nodes.op(
            "TensorScatter", *inputs, name=present(self._index, which), axis=-2, mode="linear"
        )

    def _mask(self) -> ir.Value:
        assert self._shared.slots is not None
        attention, masks = self._attention, self._shared.slots.masks
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
