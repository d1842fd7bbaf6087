"""The KV cache: buffers for the keys and values of each layer, which grow with the sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvexport.bundle import Bundle
from kvexport.bundle.graph_io import CHUNK, KEY, STATE, VALUE, past, ring_of, ring_slots
from kvexport.errors import CannotRunHere, UsageError
from kvexport.eviction.config import LATEST, NEVER, POSITION_PLUS_ONE, SCORE, STATE_WIDTH
from kvexport.runtime.cache.device_arrays import HOST, Storage, as_float32, from_float, stored_as
from kvexport.runtime.cache.eviction import Ints, Occupancy, Ranking, State, make_room
from kvexport.runtime.cache.rings import Rings

# Tokens by which the buffers grow. Attention reads whole buffers, so their size should follow the sequence
# closely. One copy when they grow costs 1/STEP of what attention reads until they grow again.
STEP = 256


@dataclass(frozen=True)
class _Buffer:
    """A cache input of the graph.

    [batch, heads, slots, width], or [batch·heads, 1, slots, width] if its layer evicts. `ring`: the window of
    a ring (`kvexport.bundle.graph_io.ring_of`); None: it is not one.
    """

    layer: int
    heads: int
    width: int
    dtype: str
    evicts: bool
    ring: int | None

    def shape(self, batch: int, slots: int) -> tuple[int, ...]:
        return (
            (batch * self.heads, 1, slots, self.width)
            if self.evicts
            else (batch, self.heads, slots, self.width)
        )

    def bytes(self, batch: int, slots: int) -> int:
        return batch * self.heads * slots * self.width * stored_as(self.dtype).itemsize


class KvCache:
    """Buffers by the name of their graph input (`kvexport.bundle.graph_io.cache_specs`).

    Nothing is allocated at first.

    Attributes:
        num_layers: number of layers.
        batch: number of sequences.
        capacity: tokens of a sequence that memory is allocated for: 0, a multiple of the growth step, or the
            limit.
        limit: the largest number of tokens of a sequence.
        slots: the largest number of tokens in layers that evict; None if no layer evicts.
        chunk: tokens of a call that a ring holds besides its window.
        rings: slots of the layers whose cache is a ring.
        dtype: of keys and values, by name.
        place: where the buffers are.
        buffers: layer by layer, key, value and, where it evicts, state: numpy arrays, or `DeviceArray`s.
        bound: what an engine keeps that it made for these very buffers; dropped before one of them is
            replaced.
    """

    def __init__(
        self,
        bundle: Bundle,
        batch: int,
        dtype: str,
        *,
        fill: float = 0.0,
        step: int = STEP,
        limit: int | None = None,
        storage: Storage = HOST,
        slots: int | None = None,
        chunk: int = CHUNK,
    ) -> None:
        """
        Args:
            bundle: determines layers and shapes.
            batch: number of sequences.
            dtype: of keys and values: the bundle's, unless a copy of its graph computes in another.
            fill: value of unwritten slots; no result may depend on it.
            step: tokens by which the buffers grow.
            limit: the largest number of tokens of a sequence; None: the bundle's capacity.
            storage: host or device memory.
            slots: of layers that evict; None: the bundle's budget.
            chunk: tokens of a call that a ring holds besides its window.
        """
        self._bundle, self.dtype, self._fill, self._step, self.num_layers = (
            bundle,
            dtype,
            fill,
            step,
            len(bundle.layers),
        )
        self._specs: dict[str, _Buffer] = {}
        self._rankings: dict[int, Ranking] = {}  # of the layers that evict
        eviction = bundle.eviction
        for index, layer in enumerate(bundle.layers):
            evicts = eviction is not None and eviction.evicts(index)
            ring = ring_of(layer.window, bundle.capacity, evicts)
            parts = {KEY: (layer.key_head_dim, dtype), VALUE: (layer.value_head_dim, dtype)}
            if evicts:
                assert eviction is not None
                parts[STATE] = STATE_WIDTH, "float32"
                self._rankings[index] = Ranking(eviction, layer.window)
            for which, (width, kind) in parts.items():
                self._specs[past(index, which)] = _Buffer(
                    index, layer.num_key_value_heads, width, kind, evicts, ring
                )
        self.batch = batch
        self.capacity = 0
        self.limit = bundle.capacity if limit is None else limit
        self.chunk = chunk
        windows = sorted({spec.ring for spec in self._specs.values() if spec.ring is not None})
        self.rings = Rings({each: ring_slots(each, self.limit, self.chunk) for each in windows}, self.limit)
        self.slots = None if eviction is None else min(slots or eviction.budget, self.limit)
        self.storage = storage
        self.buffers: dict[str, Any] = {}
        self.bound: Any = None
        self._empty()

    def fresh(self, batch: int, slots: int | None = None) -> KvCache:
        """A cache of `batch` empty sequences in place of this one.

        A new one, or this one, emptied, if memory is allocated once.

        Args:
            batch: number of sequences.
            slots: of layers that evict; None: as many as in this cache.
        """
        return self.another(batch, slots)

    def another(self, batch: int, slots: int | None = None) -> KvCache:
        """An empty cache of the same kind beside this one; arguments as `fresh`."""
        return KvCache(
            self._bundle,
            batch,
            self.dtype,
            fill=self._fill,
            step=self._step,
            limit=self.limit,
            storage=self.storage,
            slots=slots or self.slots,
            chunk=self.chunk,
        )

    def reserve(self, tokens: int) -> None:
        """Grow the buffers for sequences of `tokens` tokens, one buffer after another; the contents are kept.

        Raises:
            UsageError: more than the limit.
            CannotRunHere: there is not enough memory; the contents are unchanged.
        """
        if tokens <= self.capacity:
            return
        self.require_room(tokens, "the sequence must fit the capacity")
        capacity = min(-(-tokens // self._step) * self._step, self.limit)
        for name, spec in self._specs.items():
            self._resize(name, spec, self._slots_for(spec, capacity))
        all_full = all(
            self._slots_for(spec, capacity) == self._slots_for(spec, self.limit)
            for spec in self._specs.values()
        )
        self.capacity = self.limit if all_full else capacity

    def require_room(self, tokens: int, what: str) -> None:
        """
        Args:
            tokens: number of tokens of a sequence.
            what: first line of the error.

        Raises:
            UsageError: more tokens than the limit.
        """
        if tokens <= self.limit:
            return
        bundle, trained = self._bundle, self._bundle.model.max_position_embeddings
        fix = f"shorten the text: the model was trained for {trained} positions"
        if self.limit < bundle.capacity:
            enough = min(tokens, bundle.capacity)
            fix = f"shorten the text, or build the engine again with --capacity {enough} or more"
        elif trained is None or bundle.capacity < trained:
            fix = f"shorten the text, or build the bundle again with --capacity {tokens} or more"
        raise UsageError(what, got=f"{tokens} tokens", expected=f"at most {self.limit}", fix=fix)

    def admit(self, positions: Ints, row: int | None = None) -> Ints:
        """The graph's `write_indices` [B] for a call of tokens whose room is reserved.

        Evicts tokens if it is needed for them.

        Args:
            positions: positions of the tokens, consecutive [B, S]; if layers evict, they continue the
                sequence, or repeat its last token.
            row: the only sequence of the call; None: all.
        """
        first, count = positions[:, 0], positions.shape[1]
        assert self.rings.tokens_of_call(first, count) == count, "a call must not wrap in a ring"
        if self.slots is None:
            return first
        rows = slice(0, self.batch) if row is None else slice(row, row + 1)
        slots = min(self.slots, self.capacity)
        usable = slots - self._blocked
        assert count <= usable, "a call must not have more tokens than slots"
        if count > 1:
            for sequence in range(self.batch)[rows]:
                self.shrink(sequence, usable - count)
        return self._rows.take(rows, first, count, usable, slots)

    def compress(self) -> None:
        """Evict all tokens beyond the bundle's budget at once, and shrink the buffers to it."""
        eviction = self._bundle.eviction
        assert eviction is not None and self.slots is not None
        self.slots = min(eviction.budget, self.slots)
        for row in range(self.batch):
            self.shrink(row, self.slots)
        for name, spec in self._specs.items():
            self._resize(name, spec, self._slots_for(spec, self.capacity))

    def clear(self) -> None:
        """Remove all tokens."""
        self.release()

    def release(self) -> None:
        """Remove all tokens and release the buffers."""
        self.bound = None
        self.buffers.clear()
        self.capacity = 0
        self._empty()

    def _empty(self) -> None:
        """Reset the bookkeeping to empty buffers."""
        self._rows, self._blocked = Occupancy.empty(self.batch), 0

    def block(self, slots: int) -> None:
        """Restrict layers that evict to `slots` slots until the cache, which must be empty, is emptied again.

        The other slots are marked as tokens of future positions, which are never attended to and never
        evicted.
        """
        assert self.slots is not None and not self._rows.seen.any()
        self.reserve(self.slots)
        self._blocked = self.slots - slots
        for layer in self._rankings:
            state = self.storage.read(self.buffers[past(layer, STATE)])
            state[:, :, slots:, SCORE], state[:, :, slots:, POSITION_PLUS_ONE] = -NEVER, LATEST
            self.storage.write(self.buffers[past(layer, STATE)], state)

    def layer(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Whole buffers of a layer's keys and values [batch, N, slots, width].

        Views in host memory, copies of device memory.
        """
        key, value = (self.storage.read(self.buffers[past(index, which)]) for which in (KEY, VALUE))
        return key.reshape(self.batch, -1, *key.shape[2:]), value.reshape(self.batch, -1, *value.shape[2:])

    def layer_in_float32(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Float32 copies of a layer's keys and values [batch, N, slots, width]."""
        key, value = (as_float32(buffer, self.dtype) for buffer in self.layer(index))
        return key, value

    def state(self, index: int) -> State:
        """A copy of the eviction state of a layer for the first sequence, float32 [N, slots, 2]."""
        name = past(index, STATE)
        state = self.storage.read_rows(self.buffers[name], self.rows_of(name, 0))[:, 0]
        return state[:, : state.shape[1] - self._blocked]

    def set_state(self, index: int, state: State) -> None:
        """Replace the eviction state of a layer for the first sequence, [N, any number of slots, 2].

        The rest becomes empty.
        """
        name = past(index, STATE)
        buffer, rows = self.buffers[name], self.rows_of(name, 0)
        states = self.storage.read_rows(buffer, rows)
        usable = states.shape[2] - self._blocked
        assert not state[:, usable:].any(), "tokens must be in usable slots"
        states[:, 0, :usable] = 0
        states[:, 0, : state.shape[1]][:, :usable] = state[:, :usable]
        self.storage.write_rows(buffer, rows, states)

    def bytes(self, tokens: int) -> int:
        """Bytes of all buffers for sequences of `tokens` tokens."""
        return sum(spec.bytes(self.batch, self._slots_for(spec, tokens)) for spec in self._specs.values())

    def layer_bytes(self) -> tuple[int, ...]:
        """Bytes allocated now, per layer."""
        allocated = [0] * self.num_layers
        for name, buffer in self.buffers.items():
            allocated[self._specs[name].layer] += buffer.nbytes
        return tuple(allocated)

    @property
    def occupancy(self) -> Occupancy | None:
        """Slots in use in layers that evict; None if no layer evicts."""
        return None if self.slots is None else self._rows

    def occupy(self, occupancy: Occupancy) -> None:
        """Set the slots in use, after their contents were written."""
        self._rows = occupancy

    def ring(self, name: str) -> int | None:
        """The window of a buffer that is a ring; None: it is not one."""
        return self._specs[name].ring

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the buffers, allocated or not."""
        return tuple(self._specs)

    def evicts(self, name: str) -> bool:
        """Whether the layer of a buffer evicts."""
        return self._specs[name].evicts

    def shape_of(self, name: str, batch: int, tokens: int, filled: int) -> tuple[int, ...]:
        """Shape of the part of a buffer that `batch` sequences use.

        Args:
            name: name of the buffer.
            batch: number of sequences.
            tokens: number of tokens of a sequence, in layers that do not evict; a ring needs its window.
            filled: slots in use, in layers that evict.
        """
        spec = self._specs[name]
        if spec.ring is not None:
            tokens = min(tokens, spec.ring)
        return spec.shape(batch, filled if spec.evicts else tokens)

    def dtype_of(self, name: str) -> str:
        """The dtype of a buffer."""
        return self._specs[name].dtype

    def rows_of(self, name: str, row: int) -> slice:
        """The rows of a sequence in the first dimension of a buffer."""
        spec = self._specs[name]
        rows = spec.heads if spec.evicts else 1
        return slice(row * rows, (row + 1) * rows)

    def _slots_for(self, spec: _Buffer, tokens: int) -> int:
        """Slots that a sequence of `tokens` tokens needs."""
        if spec.ring is not None:
            return min(tokens, self.rings.slots[spec.ring])
        return min(tokens, self.slots) if spec.evicts and self.slots is not None else tokens

    def shrink(self, row: int, keep: int) -> None:
        """Evict tokens of a sequence until at most `keep` remain in layers that evict."""
        filled, seen = int(self._rows.filled[row]), int(self._rows.seen[row])
        if filled <= keep:
            return
        for layer, ranking in self._rankings.items():
            key, value, state = (self.buffers[past(layer, which)] for which in (KEY, VALUE, STATE))
            make_room(
                self.storage,
                (key, value, state),
                self.rows_of(past(layer, KEY), row),
                ranking,
                filled,
                keep,
                seen,
            )
        self._rows.filled[row] = keep

    def _resize(self, name: str, spec: _Buffer, slots: int) -> None:
        """Replace a buffer by one of `slots` slots with the same contents.

        Raises:
            CannotRunHere: there is not enough memory.
        """
        old, shape = self.buffers.get(name), spec.shape(self.batch, slots)
        if old is not None and old.shape == shape:
            return
        self.bound = None
        try:
            # Zeros, because attention multiplies masked slots by 0, and 0 times NaN would be NaN.
            fresh: Any = self.storage.zeros(shape, spec.dtype)
        except MemoryError as error:
            raise CannotRunHere(
                "there is not enough memory for the KV cache",
                got=f"{self.bytes(slots)} bytes for {slots} tokens, {self.batch} sequences",
                fix="run fewer or shorter sequences",
            ) from error
        if self._fill and not name.endswith(STATE):
            self.storage.write(fresh, np.full(shape, from_float(self._fill, self.dtype)))
        if old is not None:
            self.storage.copy_slots(old, fresh, min(slots, old.shape[2]))
        self.buffers[name] = fresh
