"""Where the twin put each token of a layer that evicts, and what it ranked it by: held against what another run did.

Which slot is overwritten depends on numbers that two runs round differently, and from the first that differs all that
follows would. So the run that is compared gets the twin's state before every call: each choice is judged for itself. Knows
arrays as numpy has them; must not know who ran.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvexport.errors import BundleError
from kvexport.eviction.config import POSITION_PLUS_ONE, SCORE, STATE_WIDTH, Eviction

Array = NDArray[np.float32]
NAMES = ("score", "slot")  # of the twin's arrays of a layer that evicts, each [T, N]


class ReferenceSlots:
    """One layer: `score` [T, N] and `slot` [T, N] of every token in each of N KV heads, among `slots` slots."""

    def __init__(self, score: Array, slot: NDArray[Any], slots: int) -> None:
        self._score, self._slot = score, slot.astype(np.int64)
        self._state = np.zeros((slot.shape[1], slots, STATE_WIDTH), np.float32)
        self._tokens = 0

    @property
    def slots(self) -> int:
        return self._state.shape[1]

    def state(self, tokens: int) -> Array:
        """The state of all slots after so many tokens, [N, slots, 2]; asked for more and more of them."""
        heads = np.arange(len(self._state))
        for token in range(self._tokens, tokens):
            self._state[heads, self._slot[token], SCORE] = self._score[token]
            self._state[heads, self._slot[token], POSITION_PLUS_ONE] = token + 1
        self._tokens = tokens
        return self._state

    def seen(self, caches: Mapping[str, Array], start: int, stop: int) -> dict[str, Array]:
        """What a run did with tokens start..stop-1.

        Args:
            caches: after it, "key" and "value" [N, slots, width] and "state" [N, slots, 2].

        Returns:
            `key` and `value` [n, N·width] and `score` [n, N] where the twin has the tokens, and `slot` [n, N] where the run
            says that they are, -1 where it has none of that position.
        """
        heads, where = np.arange(len(self._state)), self._slot[start:stop]  # [n, N]
        rows = {
            name: cache[heads, where].astype(np.float32) for name, cache in caches.items()
        }  # [n, N, width]
        stored = (
            caches["state"][None, :, :, POSITION_PLUS_ONE] == np.arange(start + 1, stop + 1)[:, None, None]
        )  # [n, N, slots]
        slot = np.where(stored.any(2), stored.argmax(2), -1).astype(np.float32)
        side_by_side = {name: rows[name].reshape(stop - start, -1) for name in ("key", "value")}
        return {**side_by_side, "score": rows["state"][..., SCORE], "slot": slot}


def reference_slots(
    twin: Mapping[str, NDArray[Any]], eviction: Eviction | None, num_layers: int
) -> dict[int, ReferenceSlots]:
    """Of the layers that evict, by their index.

    Raises:
        BundleError: a slot that the eviction does not have.
    """
    if eviction is None:
        return {}
    for layer in range(num_layers):
        if eviction.evicts(layer) and twin[f"layers.{layer}.slot"].max() >= eviction.self_test_slots:
            raise BundleError(
                "the bundle's reference was recorded with another budget than its manifest says",
                got=f"slot {int(twin[f'layers.{layer}.slot'].max())} of layer {layer}",
                expected=f"below {eviction.self_test_slots}",
                fix="build the bundle again",
            )
    return {
        layer: ReferenceSlots(
            twin[f"layers.{layer}.score"], twin[f"layers.{layer}.slot"], eviction.self_test_slots
        )
        for layer in range(num_layers)
        if eviction.evicts(layer)
    }
