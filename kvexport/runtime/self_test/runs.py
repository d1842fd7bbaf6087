"""The runs of a self-test.

Tokens in a cache filled with garbage, and the numbers that each token leaves in it.

`kvexport.runtime.self_test.verdict` compares them with the reference. The C++ library implements the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvexport.bundle import Bundle
from kvexport.bundle.graph_io import KEY, STATE, past
from kvexport.bundle.self_test_file import RANKED_BY_NORM, ReferenceOutputs, steady_scores
from kvexport.eviction.config import LATER, POSITION_PLUS_ONE, SCORE
from kvexport.runtime.backends.base import Decoder
from kvexport.runtime.cache.device_arrays import from_float
from kvexport.runtime.cache.kv_cache import KvCache

GARBAGE = 1000.0
STEP = 16  # tokens by which caches grow, if they can: several times within the test
CHUNK = 7  # prompt tokens per call: several calls within the test; rings hold so many beside the window
FLOOR = 1e-6  # lower bound of norms and logits in relative errors


@dataclass
class Measured:
    """Measured numbers of one row, as in `kvexport.bundle.self_test_file.Row`.

    Attributes:
        rms, likeliest: root mean square and most likely token of the logits.
        values: selected logits.
        key_norms, value_norms: per layer.
        scores: error of the eviction score per layer; 0 if the policy does not rank by norm.
    """

    rms: float
    likeliest: int
    values: NDArray[np.float64]
    key_norms: NDArray[np.float64]
    value_norms: NDArray[np.float64]
    scores: NDArray[np.float64]


class Runs:
    """Runs tokens in caches that are empty but for garbage.

    Attributes:
        tokens: prompt and continuation, as many as the cache can hold.
        prompt: number of prompt tokens among them.
    """

    def __init__(self, bundle: Bundle, reference: ReferenceOutputs, decoder: Decoder) -> None:
        self._bundle, self._reference, self._decoder = bundle, reference, decoder
        self.tokens = reference.tokens[: decoder.cache.limit]
        self.prompt = min(len(reference.prompt), len(self.tokens))
        eviction = bundle.eviction
        self._evicting = [
            layer for layer in range(len(bundle.layers)) if eviction is not None and eviction.evicts(layer)
        ]
        self._policy = "" if eviction is None else eviction.policy

    def run_pieces(self, pieces: Sequence[range]) -> list[Measured]:
        """Run tokens in calls of these pieces, or of parts of them where a call would wrap in a ring.

        Returns:
            the rows from the reference's first one on.
        """
        cache = self._begin()
        rows: list[Measured] = []
        for piece in pieces:
            rows += self._run_piece(cache, piece)
        for layer in range(len(self._bundle.layers)):
            if layer not in self._evicting and not self._loses_tokens(cache, layer):
                self._read_norms(cache, layer, self._reference.first_row, rows)
        return rows

    def generate(self, count: int) -> int:
        """Generate greedily; returns how many of the continuation's first `count` tokens are reproduced."""
        cache = self._begin()
        measured: list[Measured] = []
        for piece in pieces_of(0, self.prompt, min(self._decoder.max_tokens_per_call, CHUNK)):
            measured = self._run_piece(cache, piece) or measured
        for at in range(self.prompt, self.prompt + count):
            token = measured[-1].likeliest
            if token != self.tokens[at]:
                return at - self.prompt
            measured = self._call(cache, np.array([token]), at)
        return count

    def _begin(self) -> KvCache:
        """A cache in use, whose keys and values are garbage."""
        decoder = self._decoder
        cache = decoder.cache.fresh(1)
        for name, buffer in cache.buffers.items():  # of an engine; other caches are filled as they grow
            dtype = cache.dtype_of(name)
            if not name.endswith(f".{STATE}"):
                cache.storage.write(buffer, np.full(buffer.shape, from_float(GARBAGE, dtype)))
        slots = self._reference.slots
        if slots is not None and cache.slots is not None and cache.slots > slots:
            cache.block(slots)
        decoder.use(cache)
        return cache

    def _run_piece(self, cache: KvCache, piece: range) -> list[Measured]:
        """Run a piece of the tokens in calls that wrap in no ring; returns their rows."""
        rows: list[Measured] = []
        for call in cache.rings.calls(piece, len(piece)):
            rows += self._call(cache, self.tokens[call.start : call.stop], call.start)
        return rows

    def _call(self, cache: KvCache, ids: NDArray[np.int64], start: int) -> list[Measured]:
        """Run `ids` from position `start` on.

        Returns their rows, with norms of the layers that lose tokens only.
        """
        positions = start + np.arange(len(ids))
        first_row = self._reference.first_row
        measured_at = [row for row in range(start, start + len(ids)) if row >= first_row]
        index = np.array([row - start for row in measured_at] or [0])
        logits = self._decoder.run(ids[None], positions[None], index[None])[0]
        rows = [self._measured(logits[at]) for at in range(len(measured_at))]
        for layer in range(len(self._bundle.layers)):
            if self._loses_tokens(cache, layer):
                self._read_norms(cache, layer, max(start, first_row), rows)
        for layer in self._evicting:
            state = cache.state(layer)  # [N, slots, 2]
            key, value = (heads[0] for heads in cache.layer_in_float32(layer))  # [N, slots, width]
            for row, measured in zip(measured_at, rows, strict=True):
                slots = [np.flatnonzero(head == row + 1) for head in state[..., POSITION_PLUS_ONE]]
                if not all(len(each) == 1 for each in slots):
                    measured.key_norms[layer] = measured.value_norms[layer] = math.nan
                    continue
                at = np.arange(len(slots)), np.concatenate(slots)
                measured.key_norms[layer], measured.value_norms[layer] = _norm(key[at]), _norm(value[at])
                if self._policy in RANKED_BY_NORM:
                    measured.scores[layer] = self._score_error(state[at][:, SCORE], key[at], row)
            if self._policy in RANKED_BY_NORM:
                cache.set_state(layer, steady_scores(layer, state))
        return rows

    def _loses_tokens(self, cache: KvCache, layer: int) -> bool:
        """Whether the layer's ring does not hold all tokens at the end of a run."""
        ring = cache.ring(past(layer, KEY))
        return ring is not None and cache.rings.slots[ring] < len(self.tokens)

    def _read_norms(self, cache: KvCache, layer: int, first: int, rows: Sequence[Measured]) -> None:
        """Read the norms of the tokens from `first` on in a layer that does not evict."""
        key, value = (heads[0] for heads in cache.layer_in_float32(layer))  # [N, slots, width]
        positions = np.arange(first, first + len(rows))
        slots = cache.rings.slots_of(cache.ring(past(layer, KEY)), positions)
        for slot, measured in zip(slots, rows, strict=True):
            measured.key_norms[layer] = _norm(key[:, slot])
            measured.value_norms[layer] = _norm(value[:, slot])

    def _measured(self, logits: NDArray[np.float32]) -> Measured:
        """A row of logits [vocab]; its norms and scores are filled in later."""
        wide, layers = logits.astype(np.float64), len(self._bundle.layers)
        rms, values = math.sqrt(np.mean(wide**2)), wide[list(self._reference.logit_indices)]
        return Measured(
            rms, int(logits.argmax()), values, np.zeros(layers), np.zeros(layers), np.zeros(layers)
        )

    def _score_error(self, scores: NDArray[np.float32], keys: NDArray[np.float32], row: int) -> float:
        """The largest relative error of the scores [N] of a token's keys [N, width]."""
        worst, later = 0.0, (row + 1) * LATER
        for score, key in zip(scores, keys, strict=True):
            expected = _norm(key) * (1 - later) if self._policy == "l2-norm" else -_norm(key) * (1 + later)
            worst = larger(worst, abs(score - expected) / max(abs(expected), FLOOR))
        return worst


def _norm(numbers: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.sum(numbers.astype(np.float64) ** 2)))


def pieces_of(start: int, stop: int, size: int) -> list[range]:
    """The range from `start` to `stop` in pieces of at most `size`."""
    return [range(at, min(at + size, stop)) for at in range(start, stop, min(size, max(stop - start, 1)))]


def larger(worst: float, error: float) -> float:
    """The larger of two errors; infinite if the second is not finite."""
    return max(worst, float(error)) if math.isfinite(error) else math.inf
