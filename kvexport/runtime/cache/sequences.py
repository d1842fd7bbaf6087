"""The sequences of a cache between calls: lengths, last and pending tokens; and the public `Cache`."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvexport.errors import UsageError
from kvexport.runtime.cache import saved_cache
from kvexport.runtime.cache.kv_cache import KvCache
from kvexport.runtime.lock import SessionLock
from kvexport.runtime.types import Ids


@dataclass
class Sequences:
    """A batch of sequences in a KV cache.

    Attributes:
        kv: their keys and values.
        lengths: tokens of each that were run [B].
        last: the last of them [B].
        pending: tokens of each that were generated but not run yet, at most one; the next call runs them
            first.
        changes: number of calls that ran tokens, by which a lease detects the calls of others.
        undefined: a call failed midway and left the cache half written.
    """

    kv: KvCache
    lengths: Ids
    last: Ids
    pending: list[list[int]]
    changes: int = 0
    undefined: bool = False

    @classmethod
    def empty(cls, kv: KvCache) -> Sequences:
        """Empty sequences, as many as the cache's batch."""
        return cls(
            kv, np.zeros(kv.batch, np.int64), np.zeros(kv.batch, np.int64), [[] for _ in range(kv.batch)]
        )

    def is_empty(self, row: int) -> bool:
        """Whether a sequence has no token, pending ones included."""
        return not self.lengths[row] and not self.pending[row]

    def clear(self) -> None:
        """Remove every token."""
        self.kv.clear()
        self.__dict__.update(vars(Sequences.empty(self.kv)), changes=self.changes + 1)


class Cache:
    """Sequences beside a session's own, over the same weights: one conversation, or a batch of them.

    Created by `Session.new_cache` and `Session.load`; calls with `cache=` continue its sequences. Its memory
    is released when the object is garbage-collected or the session is closed.

    Attributes:
        sequences: internal state; not part of the public API.
    """

    def __init__(self, lock: SessionLock, sequences: Sequences, digest: str) -> None:
        """
        Args:
            lock: the session's.
            digest: sha256 of the bundle, for `save`.
        """
        self.sequences, self._lock, self._digest = sequences, lock, digest
        weakref.finalize(self, sequences.kv.release).atexit = False

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.sequences.kv.batch

    @property
    def lengths(self) -> Ids:
        """Tokens of each sequence that were run, int64 [B], a copy.

        The pending token of a generation is not counted.
        """
        with self._lock:
            return self.sequences.lengths.copy()

    @property
    def bytes(self) -> int:
        """Bytes allocated now for keys, values and eviction state."""
        with self._lock:
            return sum(self.sequences.kv.layer_bytes())

    def clear(self) -> None:
        """Remove all tokens. ONNX Runtime's caches release their memory; an engine's cache keeps it."""
        with self._lock:
            self.sequences.clear()

    def save(self, path: Path | str) -> None:
        """Write the sequences to a file, which `Session.load` reads.

        A file of that name is replaced atomically.

        Args:
            path: the file to write, in an existing folder.

        Raises:
            UsageError: the folder does not exist, or a call on this cache failed midway.
            OSError: the disk is full, or the file cannot be written.
        """
        with self._lock:
            require_defined(self.sequences)
            sequences = self.sequences
            state = saved_cache.SavedState(sequences.lengths, sequences.last, sequences.pending)
            saved_cache.write(Path(path), self._digest, sequences.kv, state)


def require_defined(sequences: Sequences) -> None:
    """
    Raises:
        UsageError: a call failed midway.
    """
    if sequences.undefined:
        raise UsageError(
            "a previous call failed midway; the cache contents are undefined",
            fix="call cache.clear() or load a saved cache; for the session's own cache: session.reset()",
        )
