"""Eviction in the runtime.

Which slots a call writes, and which tokens leave before a chunk of a prompt is run.

The same algorithm as the PyTorch reference, `kvexport.eviction.reference_cache.EvictingCache.make_room`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvexport.eviction.config import LATEST, NEVER, POSITION_PLUS_ONE, SCORE, UNSEEN, Eviction
from kvexport.runtime.cache.device_arrays import Move, Storage

Ints = NDArray[np.int64]
State = NDArray[np.float32]


@dataclass
class Occupancy:
    """Slots in use in layers that evict, equal in all of their heads.

    Attributes:
        filled: slots in use of each sequence [batch].
        seen: tokens of each sequence that were run [batch], evicted ones included.
    """

    filled: Ints
    seen: Ints

    @classmethod
    def empty(cls, batch: int) -> Occupancy:
        """No slots in use."""
        return cls(np.zeros(batch, np.int64), np.zeros(batch, np.int64))

    def take(self, rows: slice, first: Ints, count: int, usable: int, slots: int) -> Ints:
        """Take slots for `count` tokens of each row, and return the graph's `write_indices` [rows].

        They fit, or `count` is 1. The last token of a sequence may be run again: the graph finds its slot
        itself once the cache is full; before that, its index is returned.

        Args:
            rows: sequences.
            first: position of the first token [rows].
            count: tokens of each.
            usable: slots that may be used.
            slots: slots of the buffers; as an index it means that a token must be evicted.
        """
        again = first == self.seen[rows] - 1
        assert ((first == self.seen[rows]) | again).all(), (
            "tokens must continue the sequence or repeat its last one"
        )
        assert count == 1 or ((self.filled[rows] + count <= usable).all() and not again.any()), (
            "several tokens at once must fit"
        )
        full = self.filled[rows] >= usable
        indices = np.where(full, slots, self.filled[rows] - again)
        self.filled[rows] = np.minimum(self.filled[rows] + count * ~again, usable)
        self.seen[rows] += count * ~again
        return indices


@dataclass(frozen=True)
class Ranking:
    """The order in which tokens of a layer are evicted.

    Attributes:
        eviction: policy and protected positions.
        window: sliding window of the layer's attention; tokens that left it are evicted before all others.
            None: full attention.
    """

    eviction: Eviction
    window: int | None

    def remaining(self, state: State, keep: int, position: int) -> Ints:
        """The slots of the tokens that remain, in the order of the slots that they move to, [N, keep].

        Args:
            state: state of each head's tokens, [N, tokens, 2].
            keep: tokens that remain.
            position: position of the token that is run next.
        """
        heads, tokens = state.shape[:2]
        recent = max(0, min(self.eviction.protect_recent, keep - self.eviction.protect_first))
        ranked = np.argsort(-self.priorities(state, position, recent), axis=1, kind="stable")
        evicted = np.zeros((heads, tokens), np.bool_)
        np.put_along_axis(evicted, ranked[:, : tokens - keep], True, axis=1)
        remaining = np.tile(np.arange(keep), (heads, 1))
        # In every head, as many tokens are evicted in front of slot `keep` as remain behind it.
        behind = np.tile(np.arange(keep, tokens), (heads, 1))[~evicted[:, keep:]]
        remaining[evicted[:, :keep]] = behind
        return remaining

    def priorities(self, state: State, position: int, recent: int) -> State:
        """Priorities [N, tokens], float32; the highest is evicted first."""
        stored, following = state[..., POSITION_PLUS_ONE], position + 1
        evictable = (stored <= following - recent) & (stored > self.eviction.protect_first)
        priorities = np.where(evictable, state[..., SCORE], np.float32(-NEVER))
        if self.window is not None:
            unseen = (np.float32(LATEST) - stored) * np.float32(UNSEEN)
            priorities = np.where(stored <= following - self.window, unseen, priorities)
        return np.where(stored == following, np.float32(NEVER), priorities)


def make_room(
    storage: Storage,
    caches: tuple[Any, Any, Any],
    rows: slice,
    ranking: Ranking,
    tokens: int,
    keep: int,
    position: int,
) -> None:
    """Evict tokens of a sequence in one layer until `keep` remain, and move those to the first slots.

    Args:
        storage: storage of the caches.
        caches: keys, values and state of the layer, [batch·N, 1, slots, ...].
        rows: the sequence's heads among batch·N.
        ranking: ranking of the layer.
        tokens: slots in use.
        keep: tokens that remain.
        position: position of the token that is run next.
    """
    key, value, state = caches
    states = storage.read_rows(state, rows)
    remaining = ranking.remaining(states[:, 0, :tokens], keep, position)
    moves = moves_for(remaining, rows.start)
    for cache in (key, value):
        storage.move(cache, moves)
    states[:, 0, :keep] = np.take_along_axis(states[:, 0], remaining[..., None], axis=1)
    states[:, 0, keep:tokens] = 0
    storage.write_rows(state, rows, states)


def moves_for(remaining: Ints, first: int) -> list[Move]:
    """The fewest moves that bring the slots `remaining` [N, keep] to the first slots.

    Heads start at row `first`.

    A token either keeps its slot or comes from behind all of them, so that no move reads what another has
    written.
    """
    moves: list[Move] = []
    last: list[Move] = []  # of the previous heads with equal moves
    for head, slots in enumerate(remaining):
        targets = np.flatnonzero(slots != np.arange(len(slots)))
        sources = slots[targets]
        ends = np.flatnonzero((np.diff(targets) != 1) | (np.diff(sources) != 1)) + 1
        runs = [run for run in np.split(np.stack((targets, sources)), ends, axis=1) if run.size]
        here = [Move(first + head, 1, int(run[0, 0]), int(run[1, 0]), run.shape[1]) for run in runs]
        if last and [each[2:] for each in here] == [each[2:] for each in last]:
            last = [each._replace(rows=each.rows + 1) for each in last]
        else:
            moves += last
            last = here
    return moves + last
