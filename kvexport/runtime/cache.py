"""The KV cache: one buffer for each layer's keys and one for its values, which grow as sequences do.

Knows shapes and bytes; must not know what is written to the buffers, nor what runs on them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvexport.bundle import Bundle
from kvexport.errors import CannotRunHere, UsageError
from kvexport.graph.contract import past

# Tokens by which the buffers grow. Attention reads all of a buffer, so its capacity follows the sequence closely;
# the copy at each growth is then 1/STEP of what attention reads between two of them.
STEP = 256


class KvCache:
    """Buffers [batch, num_key_value_heads, capacity, width] by the name of the graph's input; nothing is allocated at first.

    Attributes:
        batch: sequences.
        capacity: tokens that the buffers hold now: 0, a multiple of the growth step, or the bundle's capacity.
        buffers: key and value of layer 0, of layer 1, ...
    """

    def __init__(self, bundle: Bundle, batch: int, dtype: str, *, fill: float = 0.0, step: int = STEP) -> None:
        """Nothing is allocated before `reserve`.

        Args:
            dtype: of the buffers: the bundle's, unless a copy of its graph computes in another.
            fill: what slots hold until they are written; no result may depend on it.
            step: tokens by which the buffers grow.
        """
        self._bundle, self._dtype, self._fill, self._step = bundle, np.dtype(dtype), fill, step
        self._shapes: dict[str, tuple[int, int]] = {}  # heads and width
        for index, layer in enumerate(bundle.layers):
            self._shapes[past(index, "key")] = layer.num_key_value_heads, layer.key_head_dim
            self._shapes[past(index, "value")] = layer.num_key_value_heads, layer.value_head_dim
        self.batch = batch
        self.capacity = 0
        self.buffers: dict[str, NDArray[Any]] = {}

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens; what was written is copied, one buffer at a time.

        Raises:
            UsageError: more than the bundle's capacity.
            CannotRunHere: not enough memory; what was written is still there.
        """
        if tokens <= self.capacity:
            return
        require_room(self._bundle, tokens, "the bundle's capacity is exhausted")
        capacity = min(-(-tokens // self._step) * self._step, self._bundle.capacity)
        for name, (heads, width) in self._shapes.items():
            try:
                # Never uninitialised: a slot that is masked still meets its value, and 0 times NaN would be NaN.
                fresh = np.zeros((self.batch, heads, capacity, width), self._dtype)
            except MemoryError as error:
                raise CannotRunHere(
                    "there is not enough memory for the KV cache", seen=f"{self.bytes(capacity)} bytes for {capacity} tokens, "
                    f"{self.batch} sequences", fix="run fewer or shorter sequences",
                ) from error  # fmt: skip
            if self._fill:
                fresh[...] = self._fill
            if name in self.buffers:
                fresh[:, :, : self.capacity] = self.buffers[name][:, :, : self.capacity]
            self.buffers[name] = fresh
        self.capacity = capacity

    def layer(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """A layer's keys and values, whole buffers."""
        return self.buffers[past(index, "key")], self.buffers[past(index, "value")]

    def bytes(self, tokens: int) -> int:
        """Bytes that `tokens` tokens of every sequence take."""
        return self.batch * tokens * self._dtype.itemsize * sum(heads * width for heads, width in self._shapes.values())


def require_room(bundle: Bundle, tokens: int, what: str) -> None:
    """Refuse a sequence of `tokens` tokens that the bundle has no room for; `what` says so.

    Raises:
        UsageError: more than the bundle's capacity.
    """
    if tokens <= bundle.capacity:
        return
    trained = bundle.model.max_position_embeddings
    remedy = f"shorten the text: the model was trained for {trained} positions"
    if trained is None or bundle.capacity < trained:
        remedy = f"shorten the text, or build the bundle again with --capacity {tokens} or more"
    raise UsageError(what, seen=f"{tokens} tokens", allowed=f"at most {bundle.capacity}", fix=remedy)
