"""Layers that hold a budget of tokens: which slots a call may use, and who goes before a prompt's next tokens come.

Does in numpy what `kvexport.eviction.reference_cache.EvictingCache.make_room`, the oracle, does. Knows slots, states and positions; must not
know how attention reads them, nor which engine does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvexport.eviction.config import LATEST, NEVER, POSITION_PLUS_ONE, SCORE, UNSEEN, Eviction
from kvexport.runtime.cache.device_arrays import Move, Place

Ints = NDArray[np.int64]
State = NDArray[np.float32]


@dataclass
class Occupancy:
    """How many slots of each sequence are in use [batch], alike in all heads and layers, and how many tokens it had."""

    filled: Ints
    seen: Ints

    @classmethod
    def empty(cls, batch: int) -> Occupancy:
        return cls(np.zeros(batch, np.int64), np.zeros(batch, np.int64))

    def take(self, rows: slice, first: Ints, count: int, usable: int, slots: int) -> Ints:
        """What `write_indices` says of `count` tokens at `first` [rows] and after, which are in use from then on.

        There is room for them, or `count` is 1. The very last token may come again: the graph finds its slot, or, while there
        is room, is told.

        Args:
            usable: slots that may be in use; `slots` is how many there are.
        """
        again = first == self.seen[rows] - 1
        assert ((first == self.seen[rows]) | again).all(), (
            "tokens come one after another, or the last one again"
        )
        assert count == 1 or ((self.filled[rows] + count <= usable).all() and not again.any()), (
            "no room for several tokens"
        )
        full = self.filled[rows] >= usable
        indices = np.where(full, slots, self.filled[rows] - again)
        self.filled[rows] = np.minimum(self.filled[rows] + count * ~again, usable)
        self.seen[rows] += count * ~again
        return indices


@dataclass(frozen=True)
class Ranking:
    """Who goes first in a layer: `eviction`, and the `window` of its attention, beyond which no query sees a token."""

    eviction: Eviction
    window: int | None

    def kept(self, state: State, keep: int, position: int) -> Ints:
        """Which `keep` tokens stay before one at `position` comes: their slots [N, keep], by the slots that they take.

        Args:
            state: of each head's tokens, [N, tokens, 2].
        """
        heads, tokens = state.shape[:2]
        recent = max(0, min(self.eviction.protect_recent, keep - self.eviction.protect_first))
        ranked = np.argsort(-self._priorities(state, position, recent), axis=1, kind="stable")
        goes = np.zeros((heads, tokens), np.bool_)
        np.put_along_axis(goes, ranked[:, : tokens - keep], True, axis=1)
        kept = np.tile(np.arange(keep), (heads, 1))
        kept[goes[:, :keep]] = np.tile(np.arange(keep, tokens), (heads, 1))[
            ~goes[:, keep:]
        ]  # as many in every head
        return kept

    def _priorities(self, state: State, position: int, recent: int) -> State:
        """The highest goes first, [N, tokens] float32."""
        stored, following = state[..., POSITION_PLUS_ONE], position + 1
        evictable = (stored <= following - recent) & (stored > self.eviction.protect_first)
        priorities = np.where(evictable, state[..., SCORE], np.float32(-NEVER))
        if self.window is not None:
            unseen = (np.float32(LATEST) - stored) * np.float32(UNSEEN)
            priorities = np.where(stored <= following - self.window, unseen, priorities)
        return np.where(stored == following, np.float32(NEVER), priorities)


def make_room(
    place: Place,
    caches: tuple[Any, Any, Any],
    rows: slice,
    ranking: Ranking,
    tokens: int,
    keep: int,
    position: int,
) -> None:
    """Let a sequence's tokens in one layer go until `keep` of `tokens` are left; they move to the first slots.

    Args:
        caches: keys, values and state of the layer, [batch·N, 1, slots, ...], where `place` has them.
        rows: the sequence's heads among batch·N.
        position: of the token that comes next.
    """
    key, value, state = caches
    held = place.read_rows(state, rows)
    kept = ranking.kept(held[:, 0, :tokens], keep, position)
    moves = moves_of(kept, rows.start)
    for cache in (key, value):
        place.move(cache, moves)
    held[:, 0, :keep] = np.take_along_axis(held[:, 0], kept[..., None], axis=1)
    held[:, 0, keep:tokens] = 0
    place.write_rows(state, rows, held)


def moves_of(kept: Ints, first: int) -> list[Move]:
    """As few moves as make slot n of each head hold what `kept` [N, keep] says, neighbours together; heads begin at row `first`.

    Tokens that stay either keep their slot or come from one beyond all of them, so that no move reads what another wrote.
    """
    moves: list[Move] = []
    last: list[Move] = []  # of the head before
    for head, slots in enumerate(kept):
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
