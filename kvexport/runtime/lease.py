"""One generation's hold on a session's sequences: its own from one call to the next, or it is refused.

Knows threads and what was left behind; must not know what tokens mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvexport.errors import UsageError
from kvexport.runtime.cache.sequences import Cache
from kvexport.runtime.feeder import Active
from kvexport.runtime.types import Logits

if TYPE_CHECKING:
    from kvexport.runtime.session import Session


class SequenceLease:
    """The sequences of a cache, or of the session's own, between the calls of one generation.

    Attributes:
        capacity: the most tokens that a sequence may ever have.
    """

    def __init__(self, session: Session, cache: Cache | None) -> None:
        """Nothing is run yet; a cache must stay as it is until `prefill`.

        Raises:
            UsageError: the cache is another session's.
        """
        self._session, self._cache = session, cache
        self._sequences = session._sequences(cache)
        self._changes = self._sequences.changes
        self.capacity = session.capacity

    def length(self, row: int) -> int:
        """Tokens of a sequence that were fed."""
        return int(self._sequences.lengths[row])

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Logits, int]:
        """As `Session.prefill`; returns the logits and how many tokens were fed."""
        with self._session._guard:
            if self._cache is not None:
                self._require_untouched()
            before = 0 if self._cache is None else int(self._sequences.lengths.sum())
            logits = self._session.prefill(prompts, cache=self._cache)
            self._sequences = self._session._sequences(self._cache)
            self._changes = self._sequences.changes
            return logits, int(self._sequences.lengths.sum()) - before

    def before(self, row: int) -> list[int]:
        """The tokens that came last in a sequence, two at most, which is what decoding the next ones must see."""
        held = self._sequences
        return (
            [] if self._cache is None or not held.lengths[row] else [int(held.last[row]), *held.pending[row]]
        )

    def choose(self, row: int, token: int) -> None:
        """Let this token be the next of a sequence: it is pending."""
        with self._session._guard:
            self._require_untouched()
            self._sequences.pending[row] = [token]

    def advance(self, active: Active) -> Logits:
        """Feed what is pending in the `active` sequences [B]; returns the logits [B, vocab]."""
        with self._session._guard:
            self._require_untouched()
            logits = self._session._feeder.feed_pending(self._sequences, active)
            self._changes = self._sequences.changes
            return logits

    def _require_untouched(self) -> None:
        if (
            self._session._sequences(self._cache) is not self._sequences
            or self._sequences.changes != self._changes
        ):
            raise UsageError(
                "another call has used the sequences that this generation goes on with",
                fix="give each conversation a cache of its own: cache=session.new_cache()",
            )
