"""The KV cache: one buffer for each layer's keys and values, bound as the graph's input and output.

Knows buffers and how they grow; must not know what is written to them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime

from kvexport.bundle import BYTES, Bundle
from kvexport.errors import UsageError

STEP = 256  # tokens by which the allocated capacity grows: a decode step pays for all of it, so it follows the depth
_NUMPY = {"float32": np.float32, "float16": np.float16}


class KvCache:
    """Buffers [batch, num_key_value_heads, capacity, width], `capacity` a multiple of STEP or the bundle's limit."""

    def __init__(self, bundle: Bundle, batch: int, dtype: str, fill: float = 0.0) -> None:
        self._layers, self._limit, self._dtype = bundle.layers, bundle.capacity, dtype
        self._fill = fill  # what slots hold before they are written; only validation sets it
        self.batch = batch
        self.capacity = 0
        self.buffers: dict[str, Any] = {}  # name of the input -> OrtValue
        self.reserve(1)

    def reserve(self, tokens: int) -> bool:
        """Make room for `tokens` tokens; returns whether the buffers are new ones (the old contents are copied).

        Raises:
            UsageError: more than the bundle's capacity.
        """
        if tokens <= self.capacity:
            return False
        if tokens > self._limit:
            raise UsageError(
                "the sequence exceeds the bundle's capacity", seen=f"{tokens} tokens", allowed=f"at most {self._limit}",
                fix="shorten the prompt, or build the bundle with a larger --capacity",
            )  # fmt: skip
        self.capacity = min(-(-tokens // STEP) * STEP, self._limit)
        for index, layer in enumerate(self._layers):
            for which, width in (("key", layer.key_head_dim), ("value", layer.value_head_dim)):
                name = f"past_key_values.{index}.{which}"
                shape = (self.batch, layer.num_key_value_heads, self.capacity, width)
                fresh = np.full(shape, self._fill, _NUMPY[self._dtype])
                old = self.buffers.get(name)
                if old is not None:
                    filled = old.numpy()
                    fresh[:, :, : filled.shape[2]] = filled
                self.buffers[name] = onnxruntime.OrtValue.ortvalue_from_numpy(fresh)
        return True

    def layer(self, index: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """A layer's keys and values, whole buffers."""
        key, value = (self.buffers[f"past_key_values.{index}.{which}"].numpy() for which in ("key", "value"))
        return key, value

    def bytes(self, tokens: int) -> int:
        """Bytes that the cache of this batch takes at a capacity of `tokens`."""
        return self.batch * tokens * BYTES[self._dtype] * sum(layer.kv_width for layer in self._layers)
