"""The KV cache: buffers for each layer's keys and values, which grow as sequences do, or as far as the layer's budget.

Knows shapes, bytes, and which slots are in use where a layer evicts; must not know what is written to the buffers, nor what
runs on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvexport.bundle import graph_io as contract
from kvexport.bundle.bundle import Bundle
from kvexport.bundle.graph_io import KEY, VALUE, past
from kvexport.errors import CannotRunHere, UsageError
from kvexport.eviction.config import LATEST, NEVER, POSITION_PLUS_ONE, SCORE, STATE_WIDTH
from kvexport.runtime.cache.device_arrays import HOST, Place, as_float32, from_float, stored_as
from kvexport.runtime.cache.eviction import Ints, Occupancy, Ranking, State, make_room

# Tokens by which the buffers grow. Attention reads all of a buffer, so its capacity follows the sequence closely;
# the copy at each growth is then 1/STEP of what attention reads between two of them.
STEP = 256


@dataclass(frozen=True)
class _Buffer:
    """One input of the graph: [batch, heads, tokens, width], or [batch·heads, 1, slots, width] where its layer evicts."""

    layer: int
    heads: int
    width: int
    dtype: str
    evicts: bool

    def shape(self, batch: int, slots: int) -> tuple[int, ...]:
        return (
            (batch * self.heads, 1, slots, self.width)
            if self.evicts
            else (batch, self.heads, slots, self.width)
        )

    def bytes(self, batch: int, slots: int) -> int:
        return batch * self.heads * slots * self.width * stored_as(self.dtype).itemsize


class KvCache:
    """Buffers by the name of the graph's input, as `kvexport.bundle.graph_io.cache_specs` shapes them; nothing is allocated
    at first.

    Attributes:
        num_layers: layers.
        batch: sequences.
        capacity: tokens of a sequence that there is room for now: 0, a multiple of the growth step, or the limit.
        limit: the most that a sequence may have.
        slots: the most of them that a layer holds which evicts; None: no layer does.
        dtype: of keys and values, by name.
        place: where the buffers are.
        buffers: layer by layer, key, value and, where it evicts, state: numpy arrays, or `DeviceArray`s.
        bound: what an engine keeps that it made for these very buffers; dropped before one of them is replaced.
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
        place: Place = HOST,
        slots: int | None = None,
    ) -> None:
        """Nothing is allocated before `reserve`.

        Args:
            dtype: of keys and values: the bundle's, unless a copy of its graph computes in another.
            fill: what their slots hold until they are written; no result may depend on it.
            step: tokens by which the buffers grow.
            limit: None: the bundle's capacity.
            slots: of layers that evict. None: the bundle's budget.
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
            parts = {KEY: (layer.key_head_dim, dtype), VALUE: (layer.value_head_dim, dtype)}
            if evicts:
                assert eviction is not None
                parts[contract.STATE] = STATE_WIDTH, "float32"
                self._rankings[index] = Ranking(eviction, layer.window)
            for which, (width, kind) in parts.items():
                self._specs[past(index, which)] = _Buffer(
                    index, layer.num_key_value_heads, width, kind, evicts
                )
        self.batch = batch
        self.capacity = 0
        self.limit = bundle.capacity if limit is None else limit
        self.slots = None if eviction is None else min(slots or eviction.budget, self.limit)
        self.place = place
        self.buffers: dict[str, Any] = {}
        self.bound: Any = None
        self._empty()

    def fresh(self, batch: int, slots: int | None = None) -> KvCache:
        """What takes the place of this cache, for `batch` empty sequences: another one, or itself where memory is allocated but
        once. `slots` as in the constructor, None: as many as this one's."""
        return self.another(batch, slots)

    def another(self, batch: int, slots: int | None = None) -> KvCache:
        """A cache of the same kind beside this one; `slots` as in `fresh`."""
        return KvCache(
            self._bundle,
            batch,
            self.dtype,
            fill=self._fill,
            step=self._step,
            limit=self.limit,
            place=self.place,
            slots=slots or self.slots,
        )

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
        for name, spec in self._specs.items():
            self._resize(name, spec, self._held(spec, capacity))
        all_full = (
            len(self._rankings) == self.num_layers and self.slots is not None and capacity >= self.slots
        )
        self.capacity = self.limit if all_full else capacity

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
        raise UsageError(what, got=f"{tokens} tokens", expected=f"at most {self.limit}", fix=remedy)

    def admit(self, positions: Ints, row: int | None = None) -> Ints:
        """What `write_indices` must say of a call of tokens at consecutive `positions` [B, S], whose room is reserved.

        Where layers evict, several tokens of a sequence make room first; a sequence's tokens come one after another, and its
        last one may come again.

        Args:
            row: the call is of this sequence alone. None: of all.
        """
        first, count = positions[:, 0], positions.shape[1]
        if self.slots is None:
            return first
        rows = slice(0, self.batch) if row is None else slice(row, row + 1)
        slots = min(self.slots, self.capacity)
        usable = slots - self._blocked
        assert count <= usable, "more tokens at once than there are slots"
        if count > 1:
            for sequence in range(self.batch)[rows]:
                self._shrink(sequence, usable - count)
        return self._rows.take(rows, first, count, usable, slots)

    def compress(self) -> None:
        """Let all tokens of every sequence that are beyond the bundle's budget go at once, and the slots that they took."""
        eviction = self._bundle.eviction
        assert eviction is not None and self.slots is not None
        self.slots = min(eviction.budget, self.slots)
        for row in range(self.batch):
            self._shrink(row, self.slots)
        for name, spec in self._specs.items():
            self._resize(name, spec, self._held(spec, self.capacity))

    def clear(self) -> None:
        """Forget every sequence."""
        self.release()

    def release(self) -> None:
        """Give the buffers back."""
        self.bound = None
        self.buffers.clear()
        self.capacity = 0
        self._empty()

    def _empty(self) -> None:
        """Forget every sequence, as the buffers' zeros do."""
        self._rows, self._blocked = Occupancy.empty(self.batch), 0

    def block(self, slots: int) -> None:
        """Leave `slots` slots to layers that evict, until the cache is emptied: the others look taken, by tokens that never go
        and that nothing sees, since they are of the future. The cache is empty."""
        assert self.slots is not None and not self._rows.seen.any()
        self.reserve(self.slots)
        self._blocked = self.slots - slots
        for layer in self._rankings:
            state = self.place.read(self.buffers[past(layer, contract.STATE)])
            state[:, :, slots:, SCORE], state[:, :, slots:, POSITION_PLUS_ONE] = -NEVER, LATEST
            self.place.write(self.buffers[past(layer, contract.STATE)], state)

    def layer(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """A layer's keys and values, whole buffers [batch, N, slots, width]: the arrays, or copies of what a device holds."""
        key, value = (self.place.read(self.buffers[past(index, which)]) for which in (KEY, VALUE))
        return key.reshape(self.batch, -1, *key.shape[2:]), value.reshape(self.batch, -1, *value.shape[2:])

    def layer_in_float32(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Copies of a layer's keys and values."""
        key, value = (as_float32(buffer, self.dtype) for buffer in self.layer(index))
        return key, value

    def state(self, index: int) -> State:
        """A copy of what a layer that evicts knows of the first sequence's slots, float32 [N, slots, 2]."""
        name = past(index, contract.STATE)
        state = self.place.read_rows(self.buffers[name], self.rows_of(name, 0))[:, 0]
        return state[:, : state.shape[1] - self._blocked]

    def set_state(self, index: int, state: State) -> None:
        """Let a layer that evicts know this of the first sequence's slots [N, any number, 2]: what is left out is empty."""
        name = past(index, contract.STATE)
        buffer, rows = self.buffers[name], self.rows_of(name, 0)
        held = self.place.read_rows(buffer, rows)
        usable = held.shape[2] - self._blocked
        assert not state[:, usable:].any(), "tokens beyond the slots that there are"
        held[:, 0, :usable] = 0
        held[:, 0, : state.shape[1]][:, :usable] = state[:, :usable]
        self.place.write_rows(buffer, rows, held)

    def bytes(self, tokens: int) -> int:
        """Bytes that sequences of `tokens` tokens take, all of them together."""
        return sum(spec.bytes(self.batch, self._held(spec, tokens)) for spec in self._specs.values())

    def layer_bytes(self) -> tuple[int, ...]:
        """Bytes allocated now, layer by layer."""
        allocated = [0] * self.num_layers
        for name, buffer in self.buffers.items():
            allocated[self._specs[name].layer] += buffer.nbytes
        return tuple(allocated)

    @property
    def occupancy(self) -> Occupancy | None:
        """Which slots are in use where layers evict; None: no layer does."""
        return None if self.slots is None else self._rows

    def occupy(self, occupancy: Occupancy) -> None:
        """Take the first slots for used, which somebody has filled; there is room for them."""
        self._rows = occupancy

    @property
    def names(self) -> tuple[str, ...]:
        """Of the buffers, whether allocated or not."""
        return tuple(self._specs)

    def evicts(self, name: str) -> bool:
        """Whether a buffer is of a layer that does."""
        return self._specs[name].evicts

    def shape_of(self, name: str, batch: int, tokens: int, filled: int) -> tuple[int, ...]:
        """Of as much of a buffer as sequences of `tokens` tokens take, of which layers that evict hold `filled`."""
        spec = self._specs[name]
        return spec.shape(batch, filled if spec.evicts else tokens)

    def dtype_of(self, name: str) -> str:
        """Of a buffer."""
        return self._specs[name].dtype

    def rows_of(self, name: str, row: int) -> slice:
        """Where a sequence is in the first dimension of a buffer."""
        spec = self._specs[name]
        rows = spec.heads if spec.evicts else 1
        return slice(row * rows, (row + 1) * rows)

    def _held(self, spec: _Buffer, tokens: int) -> int:
        """Slots that sequences of `tokens` tokens take."""
        return min(tokens, self.slots) if spec.evicts and self.slots is not None else tokens

    def _shrink(self, row: int, keep: int) -> None:
        """At most `keep` tokens of a sequence stay in layers that evict."""
        filled, seen = int(self._rows.filled[row]), int(self._rows.seen[row])
        if filled <= keep:
            return
        for layer, ranking in self._rankings.items():
            key, value, state = (self.buffers[past(layer, which)] for which in (KEY, VALUE, contract.STATE))
            make_room(
                self.place,
                (key, value, state),
                self.rows_of(past(layer, KEY), row),
                ranking,
                filled,
                keep,
                seen,
            )
        self._rows.filled[row] = keep

    def _resize(self, name: str, spec: _Buffer, slots: int) -> None:
        """A buffer of so many slots, with what the old one held.

        Raises:
            CannotRunHere: not enough memory.
        """
        old, shape = self.buffers.get(name), spec.shape(self.batch, slots)
        if old is not None and old.shape == shape:
            return
        self.bound = None
        try:
            # Never uninitialised: a slot that is masked still meets its value, and 0 times NaN would be NaN.
            fresh: Any = self.place.zeros(shape, spec.dtype)
        except MemoryError as error:
            raise CannotRunHere(
                "there is not enough memory for the KV cache",
                got=f"{self.bytes(slots)} bytes for {slots} tokens, {self.batch} sequences",
                fix="run fewer or shorter sequences",
            ) from error
        if self._fill and not name.endswith(contract.STATE):
            self.place.write(fresh, np.full(shape, from_float(self._fill, self.dtype)))
        if old is not None:
            self.place.carry(old, fresh, min(slots, old.shape[2]))
        self.buffers[name] = fresh
