"""A bundle's reference tokens run in caches full of garbage, and what each token left: the self-test's hands.

Knows decoders, caches and the vectors; what a difference means is in `self_test`. The C++ library does the
same, line by line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvexport.bundle.bundle import Bundle
from kvexport.bundle.graph_io import STATE
from kvexport.bundle.self_test_file import RANKED_BY_NORM, ReferenceOutputs, steady_scores
from kvexport.eviction.config import LATER, POSITION_PLUS_ONE, SCORE
from kvexport.runtime.backends.base import Decoder
from kvexport.runtime.cache.device_arrays import from_float
from kvexport.runtime.cache.kv_cache import KvCache

GARBAGE = 1000.0
STEP = 16  # tokens by which caches grow, where they do: several times in so few
CHUNK = 7  # tokens of the prompt in a call, for the same reason
FLOOR = 1e-6  # norms and logits below it are as good as none


@dataclass
class Measured:
    """A row, as here; `scores` is the error of each layer's scores, 0 where they are not norms."""

    rms: float
    likeliest: int
    values: NDArray[np.float64]
    key_norms: NDArray[np.float64]
    value_norms: NDArray[np.float64]
    scores: NDArray[np.float64]


class Runs:
    """Runs tokens in caches that are empty but for garbage.

    Attributes:
        tokens: of prompt and continuation, as many as the cache may hold.
        prompt: how many of them are the prompt.
    """

    def __init__(self, bundle: Bundle, vectors: ReferenceOutputs, decoder: Decoder) -> None:
        self._bundle, self._vectors, self._decoder = bundle, vectors, decoder
        self.tokens = vectors.tokens[: decoder.cache.limit]
        self.prompt = min(len(vectors.prompt), len(self.tokens))
        eviction = bundle.eviction
        self._evicting = [
            layer for layer in range(len(bundle.layers)) if eviction is not None and eviction.evicts(layer)
        ]
        self._policy = "" if eviction is None else eviction.policy

    def fed(self, pieces: Sequence[range]) -> list[Measured]:
        """Rows from the first one on, of calls that take these tokens."""
        cache = self._begin()
        rows: list[Measured] = []
        for piece in pieces:
            rows += self._call(cache, self.tokens[piece.start : piece.stop], piece.start)
        for layer in range(len(self._bundle.layers)):
            if layer not in self._evicting:
                key, value = (heads[0] for heads in cache.layer_in_float32(layer))  # [N, slots, width]
                for row, measured in enumerate(rows, self._vectors.first_row):
                    measured.key_norms[layer], measured.value_norms[layer] = (
                        _norm(key[:, row]),
                        _norm(value[:, row]),
                    )
        return rows

    def generated(self, most: int) -> int:
        """How many of the continuation's first `most` tokens come, each the likeliest after those before it."""
        cache = self._begin()
        measured: list[Measured] = []
        for piece in pieces_of(0, self.prompt, min(self._decoder.max_tokens_per_call, CHUNK)):
            measured = self._call(cache, self.tokens[piece.start : piece.stop], piece.start) or measured
        for at in range(self.prompt, self.prompt + most):
            token = measured[-1].likeliest
            if token != self.tokens[at]:
                return at - self.prompt
            measured = self._call(cache, np.array([token]), at)
        return most

    def _begin(self) -> KvCache:
        """A cache whose keys and values are garbage, in use."""
        decoder = self._decoder
        cache = decoder.cache.fresh(1)
        for name, buffer in cache.buffers.items():  # of an engine's; others are filled as they grow
            dtype = cache.dtype_of(name)
            if not name.endswith(f".{STATE}"):
                cache.storage.write(buffer, np.full(buffer.shape, from_float(GARBAGE, dtype)))
        slots = self._vectors.slots
        if slots is not None and cache.slots is not None and cache.slots > slots:
            cache.block(slots)
        decoder.use(cache)
        return cache

    def _call(self, cache: KvCache, ids: NDArray[np.int64], start: int) -> list[Measured]:
        """Run `ids` at `start` and after; the rows that are of interest, of layers that do not evict without their norms."""
        positions = start + np.arange(len(ids))
        wanted = [row for row in range(start, start + len(ids)) if row >= self._vectors.first_row]
        index = np.array([row - start for row in wanted] or [0])
        logits = self._decoder.run(ids[None], positions[None], index[None])[0]
        rows = [self._measured(logits[at]) for at in range(len(wanted))]
        for layer in self._evicting:
            state = cache.state(layer)  # [N, slots, 2]
            key, value = (heads[0] for heads in cache.layer_in_float32(layer))
            for row, measured in zip(wanted, rows, strict=True):
                where = [np.flatnonzero(head == row + 1) for head in state[..., POSITION_PLUS_ONE]]
                if not all(len(slots) == 1 for slots in where):
                    measured.key_norms[layer] = measured.value_norms[layer] = math.nan
                    continue
                at = np.arange(len(where)), np.concatenate(where)
                measured.key_norms[layer], measured.value_norms[layer] = _norm(key[at]), _norm(value[at])
                if self._policy in RANKED_BY_NORM:
                    measured.scores[layer] = self._score_error(state[at][:, SCORE], key[at], row)
            if self._policy in RANKED_BY_NORM:
                cache.set_state(layer, steady_scores(layer, state))
        return rows

    def _measured(self, logits: NDArray[np.float32]) -> Measured:
        wide, layers = logits.astype(np.float64), len(self._bundle.layers)
        rms, values = math.sqrt(np.mean(wide**2)), wide[list(self._vectors.logit_indices)]
        return Measured(
            rms, int(logits.argmax()), values, np.zeros(layers), np.zeros(layers), np.zeros(layers)
        )

    def _score_error(self, scores: NDArray[np.float32], keys: NDArray[np.float32], row: int) -> float:
        """The largest relative error of the scores [N] that a token's keys [N, width] were given."""
        worst, later = 0.0, (row + 1) * LATER
        for score, key in zip(scores, keys, strict=True):
            wanted = _norm(key) * (1 - later) if self._policy == "l2-norm" else -_norm(key) * (1 + later)
            worst = larger(worst, abs(score - wanted) / max(abs(wanted), FLOOR))
        return worst


def _norm(numbers: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.sum(numbers.astype(np.float64) ** 2)))


def pieces_of(start: int, stop: int, most: int) -> list[range]:
    """From `start` to `stop` in pieces of at most so many."""
    return [range(at, min(at + most, stop)) for at in range(start, stop, min(most, max(stop - start, 1)))]


def larger(worst: float, error: float) -> float:
    """The larger of two; infinite where one is not a number."""
    return max(worst, float(error)) if math.isfinite(error) else math.inf
