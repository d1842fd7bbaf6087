"""The state that the calls of a session share: its lock, its decoder and its sequences, without text."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path

from kvexport.bundle import Bundle
from kvexport.errors import CannotRunHere, UsageError
from kvexport.runtime.backends.base import Decoder
from kvexport.runtime.cache import saved_cache
from kvexport.runtime.cache.sequences import Cache, Sequences
from kvexport.runtime.lock import SessionLock
from kvexport.runtime.prompt_runner import PromptRunner
from kvexport.runtime.types import Ids, Logits


class SessionCore:
    """The sequences of a session and what runs them. Callers hold `lock` during every method.

    Attributes:
        lock: lock that every call of the session takes.
        decoder: runs tokens.
        runner: splits prompts into calls of the decoder.
        own: the session's own sequences.
        capacity: the largest number of tokens of a sequence.
    """

    def __init__(self, bundle: Bundle, decoder: Decoder, chunk: int, *, compress_once: bool) -> None:
        """
        Args:
            chunk: the largest number of tokens of a sequence in one call.
            compress_once: as in `Session`.
        """
        self._bundle, self._compress_once = bundle, compress_once
        self.lock, self._caches = SessionLock(), weakref.WeakSet[Cache]()
        self.decoder = decoder
        self.runner = PromptRunner(bundle, decoder, chunk, compress_once=compress_once)
        self.own = Sequences.empty(decoder.cache)
        self.capacity = decoder.cache.limit

    def close(self) -> None:
        """Release the decoder and the memory of every cache.

        Waits for a running call; a second call does nothing.
        """
        with self.lock.lock:
            if self.lock.closed:
                return
            self.lock.closed = True
            for cache in self._caches:
                cache.sequences.kv.release()
            self.own.kv.release()
            del self.decoder, self.runner

    def new_cache(self, batch: int) -> Cache:
        """An empty cache; as `Session.new_cache`."""
        self._require_caches()
        try:
            kv = self.own.kv.another(batch)
            return self._add(Sequences.empty(kv))
        except MemoryError as error:
            raise CannotRunHere("there is not enough memory for so many sequences", got=batch) from error

    def load(self, path: Path) -> Cache:
        """A saved cache; as `Session.load`."""
        self._require_caches()
        vocab = self._bundle.model.vocab_size
        kv, state = saved_cache.read(path, self._bundle.digest, vocab, self.own.kv)
        return self._add(Sequences(kv, state.lengths, state.last, state.pending))

    def sequences(self, cache: Cache | None) -> Sequences:
        """The sequences of a cache; None: the session's own.

        Raises:
            UsageError: the cache belongs to another session.
        """
        if cache is None:
            return self.own
        if cache not in self._caches:
            raise UsageError(
                "the cache must belong to this session", fix="create one here: session.new_cache()"
            )
        return cache.sequences

    def restart(self, batch: int, tokens: int = 0) -> Sequences:
        """Empty the session's own sequences.

        Args:
            batch: number of sequences.
            tokens: with `compress_once`, the number of tokens of a sequence that must fit before any is
                evicted.
        """
        slots = None
        if self._compress_once:
            assert self._bundle.eviction is not None
            slots = max(tokens, self._bundle.eviction.budget)
        kv = self.own.kv.fresh(batch, slots)
        self.decoder.use(kv)
        self.own = Sequences.empty(kv)
        return self.own

    def prefill(self, prompts: Sequence[Ids], cache: Cache | None) -> Logits:
        """Run prompts of any lengths; as `Session.prefill`, for checked token ids."""
        sequences = None if cache is None else self.sequences(cache)
        counts = self.runner.counted(sequences, prompts)
        return self.runner.prefill(
            sequences or self.restart(len(prompts), int(counts.max())), prompts, counts
        )

    def _add(self, sequences: Sequences) -> Cache:
        cache = Cache(self.lock, sequences, self._bundle.digest)
        self._caches.add(cache)
        return cache

    def _require_caches(self) -> None:
        """
        Raises:
            UsageError: the session was opened with compress_once.
        """
        if self._compress_once:
            raise UsageError(
                "compress_once must be off for further caches: it works in the session's own cache only",
                fix="open the session without compress_once",
            )


def require_positive(name: str, value: int) -> None:
    """
    Raises:
        UsageError: the value is below 1.
    """
    if value < 1:
        raise UsageError(f"{name} must be at least 1", got=value)
