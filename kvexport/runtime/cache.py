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
from kvexport.runtime.arrays import HOST, Place, as_float32, from_float, stored_as

# Tokens by which the buffers grow. Attention reads all of a buffer, so its capacity follows the sequence closely;
# the copy at each growth is then 1/STEP of what attention reads between two of them.
STEP = 256


class KvCache:
    """Buffers [batch, num_key_value_heads, capacity, width] by the name of the graph's input; nothing is allocated at first.

    Attributes:
        batch: sequences.
        capacity: tokens that the buffers hold now: 0, a multiple of the growth step, or the limit.
        limit: the most that they may hold.
        dtype: of the buffers, by name.
        place: where they are.
        buffers: key and value of layer 0, of layer 1, ...: numpy arrays, or `DeviceArray`s.
    """

    def __init__(
        self, bundle: Bundle, batch: int, dtype: str, *, fill: float = 0.0, step: int = STEP, limit: int | None = None,
        place: Place = HOST,
    ) -> None:  # fmt: skip
        """Nothing is allocated before `reserve`.

        Args:
            dtype: of the buffers: the bundle's, unless a copy of its graph computes in another.
            fill: what slots hold until they are written; no result may depend on it.
            step: tokens by which the buffers grow.
            limit: None: the bundle's capacity.
        """
        self._bundle, self.dtype, self._fill, self._step = bundle, dtype, fill, step
        self._shapes: dict[str, tuple[int, int]] = {}  # heads and width
        for index, layer in enumerate(bundle.layers):
            self._shapes[past(index, "key")] = layer.num_key_value_heads, layer.key_head_dim
            self._shapes[past(index, "value")] = layer.num_key_value_heads, layer.value_head_dim
        self.batch = batch
        self.capacity = 0
        self.limit = bundle.capacity if limit is None else limit
        self.place = place
        self.buffers: dict[str, Any] = {}

    def fresh(self, batch: int) -> KvCache:
        """A cache of the same kind, for `batch` empty sequences."""
        return KvCache(
            self._bundle, batch, self.dtype, fill=self._fill, step=self._step, limit=self.limit, place=self.place
        )  # fmt: skip

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens; what was written is copied, one buffer at a time.

        Raises:
            UsageError: more than the limit.
            CannotRunHere: not enough memory; what was written is still there.
        """
        if tokens <= self.capacity:
            return
        self.require_room(tokens, "the bundle's capacity is exhausted")
        capacity = min(-(-tokens // self._step) * self._step, self.limit)
        for name, (heads, width) in self._shapes.items():
            shape = (self.batch, heads, capacity, width)
            try:
                # Never uninitialised: a slot that is masked still meets its value, and 0 times NaN would be NaN.
                fresh = self.place.zeros(shape, self.dtype)
            except MemoryError as error:
                raise CannotRunHere(
                    "there is not enough memory for the KV cache", seen=f"{self.bytes(capacity)} bytes for {capacity} tokens, "
                    f"{self.batch} sequences", fix="run fewer or shorter sequences",
                ) from error  # fmt: skip
            if self._fill:
                self.place.write(fresh, np.full(shape, from_float(self._fill, self.dtype)))  # type: ignore[arg-type]
            if name in self.buffers:
                self.place.carry(self.buffers[name], fresh, self.capacity)  # type: ignore[arg-type]
            self.buffers[name] = fresh
        self.capacity = capacity

    def require_room(self, tokens: int, what: str) -> None:
        """Refuse a sequence of `tokens` tokens that there is no room for; `what` says so.

        Raises:
            UsageError: more than the limit.
        """
        if tokens <= self.limit:
            return
        bundle, trained = self._bundle, self._bundle.model.max_position_embeddings
        remedy = f"shorten the text: the model was trained for {trained} positions"
        if self.limit < bundle.capacity:
            remedy = f"shorten the text, or build the engine again with --capacity {min(tokens, bundle.capacity)} or more"
        elif trained is None or bundle.capacity < trained:
            remedy = f"shorten the text, or build the bundle again with --capacity {tokens} or more"
        raise UsageError(what, seen=f"{tokens} tokens", allowed=f"at most {self.limit}", fix=remedy)

    def layer(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """A layer's keys and values, whole buffers: the arrays themselves, or copies of what a device holds."""
        key, value = (self.place.read(self.buffers[past(index, which)]) for which in ("key", "value"))
        return key, value

    def layer_in_float32(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Copies of a layer's keys and values."""
        key, value = (as_float32(buffer, self.dtype) for buffer in self.layer(index))
        return key, value

    def bytes(self, tokens: int) -> int:
        """Bytes that `tokens` tokens of every sequence take."""
        return self.batch * tokens * stored_as(self.dtype).itemsize * sum(heads * width for heads, width in self._shapes.values())
