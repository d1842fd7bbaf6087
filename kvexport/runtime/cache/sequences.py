"""Sequences that go on from call to call: what is kept of them besides their keys and values, and who may use them when.

Knows lengths, last tokens and threads; must not know how tokens are run, nor what they mean.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from types import TracebackType

import numpy as np

from kvexport.errors import UsageError
from kvexport.runtime.cache import saved_cache as saved
from kvexport.runtime.cache.kv_cache import KvCache
from kvexport.runtime.types import Ids


@dataclass
class Sequences:
    """A batch of sequences in a cache.

    Attributes:
        kv: their keys and values.
        lengths: tokens of each that were fed [B].
        last: the last of them [B].
        pending: tokens of each that were chosen but not fed yet, at most one; the next call feeds them first.
        changes: how often tokens were fed, so that whoever goes on can tell whether somebody else came between.
        broken: a call was broken off in its midst, so that what the cache holds is not known.
    """

    kv: KvCache
    lengths: Ids
    last: Ids
    pending: list[list[int]]
    changes: int = 0
    broken: bool = False

    @classmethod
    def empty(cls, kv: KvCache) -> Sequences:
        return cls(
            kv, np.zeros(kv.batch, np.int64), np.zeros(kv.batch, np.int64), [[] for _ in range(kv.batch)]
        )

    def begins(self, row: int) -> bool:
        """Whether a sequence has no token yet."""
        return not self.lengths[row] and not self.pending[row]

    def clear(self) -> None:
        """Forget every token."""
        self.kv.clear()
        self.__dict__.update(vars(Sequences.empty(self.kv)), changes=self.changes + 1)


class SessionLock:
    """Lets one thread in at a time, and none once its session is closed."""

    def __init__(self) -> None:
        self.lock, self.closed = RLock(), False

    def __enter__(self) -> None:
        self.lock.acquire()
        if self.closed:
            self.lock.release()
            raise UsageError("the session is closed", fix="open the bundle again: kvexport.open(BUNDLE)")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lock.release()


class Cache:
    """Sequences over the weights of a session, beside its own; calls with `cache=` go on with them (`Session.new_cache`).

    Its memory is given back when nothing refers to it any more, or when its session is closed.

    Attributes:
        sequences: the runtime's own; no caller needs it.
    """

    def __init__(self, guard: SessionLock, sequences: Sequences, digest: str) -> None:
        """
        Args:
            digest: the `manifest_sha256` of the bundle.
        """
        self.sequences, self._guard, self._digest = sequences, guard, digest
        weakref.finalize(self, sequences.kv.release).atexit = False

    @property
    def batch(self) -> int:
        """How many sequences."""
        return self.sequences.kv.batch

    @property
    def lengths(self) -> Ids:
        """Tokens of each sequence [B], but for one that was generated last and is fed first by the next call; a copy."""
        with self._guard:
            return self.sequences.lengths.copy()

    @property
    def bytes(self) -> int:
        """Allocated now."""
        with self._guard:
            return sum(self.sequences.kv.layer_bytes())

    def clear(self) -> None:
        """Forget all tokens. On ONNX Runtime the memory is given back; an engine's cache keeps it."""
        with self._guard:
            self.sequences.clear()

    def save(self, path: Path | str) -> None:
        """Write what the cache holds to a file, which `Session.load` reads; it appears whole, in place of one that was there.

        Raises:
            UsageError: the folder does not exist, or a call on this cache was broken off.
            OSError: the disk is full, or will not be written.
        """
        with self._guard:
            require_whole(self.sequences)
            held = self.sequences
            saved.write(Path(path), self._digest, held.kv, saved.State(held.lengths, held.last, held.pending))


def require_whole(sequences: Sequences) -> None:
    """
    Raises:
        UsageError: a call was broken off in its midst.
    """
    if sequences.broken:
        raise UsageError(
            "a call on this cache was broken off in its midst, so that what it holds is not known",
            fix="begin anew: cache.clear(), or session.reset() for the session's own",
        )
