"""The lease of one generation on its sequences: they must not change between its calls."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvexport.errors import UsageError
from kvexport.runtime.cache.sequences import Cache
from kvexport.runtime.core import SessionCore
from kvexport.runtime.prompt_runner import Active
from kvexport.runtime.types import Logits


class SequenceLease:
    """The sequences of a cache, or the session's own, for one generation.

    Attributes:
        capacity: the largest number of tokens of a sequence.
    """

    def __init__(self, core: SessionCore, cache: Cache | None) -> None:
        """Nothing is run yet. The sequences of a cache must not change until `prefill`.

        Raises:
            UsageError: the cache belongs to another session.
        """
        self._core, self._cache = core, cache
        self._sequences = core.sequences(cache)
        self._changes = self._sequences.changes
        self.capacity = core.capacity

    def length(self, row: int) -> int:
        """Tokens of a sequence that were run."""
        return int(self._sequences.lengths[row])

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Logits, int]:
        """Run a prompt for each sequence; without a cache, from the start.

        Returns:
            Logits [B, vocab] after the last token of each, and the number of tokens that were run.

        Raises:
            UsageError: as `Session.prefill`, or another call has changed the sequences.
        """
        with self._core.lock:
            if self._cache is not None:
                self._require_unchanged()
            before = 0 if self._cache is None else int(self._sequences.lengths.sum())
            logits = self._core.prefill([np.array(each, np.int64) for each in prompts], self._cache)
            self._sequences = self._core.sequences(self._cache)
            self._changes = self._sequences.changes
            return logits, int(self._sequences.lengths.sum()) - before

    def context(self, row: int) -> list[int]:
        """The last one or two tokens of a sequence, as context for decoding the text that follows."""
        sequences = self._sequences
        if self._cache is None or not sequences.lengths[row]:
            return []
        return [int(sequences.last[row]), *sequences.pending[row]]

    def choose(self, row: int, token: int) -> None:
        """Make a token the pending one of a sequence.

        Raises:
            UsageError: another call has changed the sequences.
        """
        with self._core.lock:
            self._require_unchanged()
            self._sequences.pending[row] = [token]

    def advance(self, active: Active) -> Logits:
        """Run the pending tokens of the `active` sequences [B]; returns the logits [B, vocab].

        Raises:
            UsageError: another call has changed the sequences.
        """
        with self._core.lock:
            self._require_unchanged()
            logits = self._core.runner.run_pending(self._sequences, active)
            self._changes = self._sequences.changes
            return logits

    def _require_unchanged(self) -> None:
        """
        Raises:
            UsageError: another call has changed the sequences.
        """
        sequences = self._core.sequences(self._cache)
        if sequences is not self._sequences or sequences.changes != self._changes:
            raise UsageError(
                "the sequences of a generation must not be changed by another call until it ends",
                fix="give each conversation its own cache: cache=session.new_cache()",
            )
