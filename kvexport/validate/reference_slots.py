"""The slot and the score of each token in the layers that evict, as the reference has them.

Which slot is overwritten depends on numbers that two runs round differently, and after the first different
slot all later ones would differ too. So the run that is compared gets the reference's state before every
call, and each choice of a slot is judged alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvexport.errors import BundleError
from kvexport.eviction.config import POSITION_PLUS_ONE, SCORE, STATE_WIDTH, Eviction

Array = NDArray[np.float32]
SLOT_ARRAYS = ("score", "slot")  # recorded for a layer that evicts, each [T, N]


class ReferenceSlots:
    """One layer's `score` [T, N] and `slot` [T, N] of every token in each of N KV heads, with `slots`
    slots."""

    def __init__(self, score: Array, slot: NDArray[Any], slots: int) -> None:
        self._score, self._slot = score, slot.astype(np.int64)
        self._state = np.zeros((slot.shape[1], slots, STATE_WIDTH), np.float32)
        self._tokens = 0

    @property
    def slots(self) -> int:
        return self._state.shape[1]

    def state(self, tokens: int) -> Array:
        """The state of all slots after `tokens` tokens, [N, slots, 2]; `tokens` must not decrease between
        calls."""
        heads = np.arange(len(self._state))
        for token in range(self._tokens, tokens):
            self._state[heads, self._slot[token], SCORE] = self._score[token]
            self._state[heads, self._slot[token], POSITION_PLUS_ONE] = token + 1
        self._tokens = tokens
        return self._state

    def read(self, caches: Mapping[str, Array], start: int, stop: int) -> dict[str, Array]:
        """Read tokens start..stop-1, n of them, from the caches of a run.

        Args:
            caches: "key" and "value" [N, slots, width] and "state" [N, slots, 2] after the run.

        Returns:
            `key` and `value` [n, N·width] and `score` [n, N] in the reference's slots, and `slot` [n, N], the
            slot in which the run has each position, -1 if it has none.
        """
        heads, slots = np.arange(len(self._state)), self._slot[start:stop]  # [n, N]
        rows = {
            name: cache[heads, slots].astype(np.float32) for name, cache in caches.items()
        }  # [n, N, width]
        stored = (
            caches["state"][None, :, :, POSITION_PLUS_ONE] == np.arange(start + 1, stop + 1)[:, None, None]
        )  # [n, N, slots]
        slot = np.where(stored.any(2), stored.argmax(2), -1).astype(np.float32)
        side_by_side = {name: rows[name].reshape(stop - start, -1) for name in ("key", "value")}
        return {**side_by_side, "score": rows["state"][..., SCORE], "slot": slot}


def reference_slots(
    reference: Mapping[str, NDArray[Any]], eviction: Eviction | None, num_layers: int
) -> dict[int, ReferenceSlots]:
    """The `ReferenceSlots` of each layer that evicts, by its index.

    Raises:
        BundleError: a recorded slot exceeds the slots of the eviction.
    """
    if eviction is None:
        return {}
    for layer in range(num_layers):
        if eviction.evicts(layer) and reference[f"layers.{layer}.slot"].max() >= eviction.self_test_slots:
            raise BundleError(
                "the bundle's reference outputs must be recorded with the KV budget of its manifest",
                got=f"slot {int(reference[f'layers.{layer}.slot'].max())} of layer {layer}",
                expected=f"below {eviction.self_test_slots}",
                fix="build the bundle again",
            )
    return {
        layer: ReferenceSlots(
            reference[f"layers.{layer}.score"], reference[f"layers.{layer}.slot"], eviction.self_test_slots
        )
        for layer in range(num_layers)
        if eviction.evicts(layer)
    }
