"""Rings: caches of layers with a sliding window, which hold the window and the tokens of one call.

The token at position p is in slot p mod R of R slots (`kvexport.bundle.graph_io.ring_of`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Rings:
    """The rings of a cache.

    Attributes:
        slots: slots of a ring when it is full, by its window.
        limit: the largest number of tokens of a sequence. A ring of so many slots never wraps.
    """

    slots: Mapping[int, int]
    limit: int

    def tokens_of_call(self, first: Ints, count: int) -> int:
        """The number of tokens, at most `count`, that one call may run from positions `first` [B] on.

        Such a call wraps in no ring, and overwrites no token that it attends to.
        """
        for window, slots in self.slots.items():
            if slots == self.limit:
                continue
            for position in first.tolist():
                room = slots - position % slots
                count = min(count, room if position < slots else min(room, slots - window))
        return count

    def calls(self, tokens: range, chunk: int) -> Iterator[range]:
        """Consecutive tokens of a sequence in calls of at most `chunk` tokens, as `tokens_of_call` allows."""
        start = tokens.start
        while start < tokens.stop:
            stop = start + self.tokens_of_call(np.array([start]), min(chunk, tokens.stop - start))
            yield range(start, stop)
            start = stop

    def slots_of(self, window: int | None, positions: Ints) -> Ints:
        """The slots of positions in the ring of a window; None: in a cache that is no ring."""
        return positions if window is None else positions % self.slots[window]
