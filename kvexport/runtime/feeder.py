"""Tokens into sequences: checked, in chunks, at the positions where each sequence is.

Knows batches, bounds and chunks; what runs the model is a `Decoder`, and who may use which sequences when is the session's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvexport.bundle.bundle import Bundle
from kvexport.errors import UsageError
from kvexport.runtime.backends.base import Decoder
from kvexport.runtime.cache.sequences import Sequences, require_whole
from kvexport.runtime.types import Ids, Logits

Active = NDArray[np.bool_]


class PromptRunner:
    """Feeds tokens to a decoder.

    Attributes:
        decoder: what runs them.
    """

    def __init__(self, bundle: Bundle, decoder: Decoder, chunk: int, *, compress_once: bool) -> None:
        """
        Args:
            chunk: the most tokens of a sequence in one call.
            compress_once: as in `Session`.
        """
        self.decoder, self._compress_once = decoder, compress_once
        self._vocab = bundle.model.vocab_size
        self._chunk = min(chunk, decoder.longest)
        if bundle.eviction is not None and not compress_once:
            self._chunk = min(self._chunk, bundle.eviction.chunk)

    def checked(self, token_ids: ArrayLike, dimensions: int = 1) -> Ids:
        """Token ids as an int64 array.

        Raises:
            UsageError: not integers, another shape, or outside the vocabulary.
        """
        try:
            ids = np.asarray(token_ids)
        except ValueError as error:  # rows of several lengths
            raise UsageError(f"token ids are not an array: {error}") from error
        if not ids.size:
            ids = ids.astype(np.int64)
        if ids.ndim != dimensions or ids.dtype.kind not in "iu":
            raise UsageError(
                "token ids are whole numbers in rows of one length",
                got=f"{ids.dtype} of {ids.ndim} dimensions",
                expected=f"integers of {dimensions}",
            )
        flat = ids.ravel().tolist()  # of so few numbers Python finds the least sooner than numpy
        if flat and not 0 <= min(flat) <= max(flat) < self._vocab:
            wrong = next(token for token in flat if not 0 <= token < self._vocab)
            raise UsageError(
                "a token id is outside the vocabulary", got=wrong, expected=f"0 to {self._vocab - 1}"
            )
        return ids.astype(np.int64, copy=False)

    def counted(self, held: Sequences | None, prompts: Sequence[Ids]) -> Ids:
        """How many tokens each prompt has [B], those that are pending among them, where they fit behind what is held.

        Raises:
            UsageError: an empty prompt where a sequence begins, another number of prompts than sequences, or more tokens than
                the capacity.
        """
        counts = np.array([len(row) for row in prompts], np.int64)
        lengths, what = counts, "the prompt is longer than the bundle's capacity"
        if held is not None:
            require_whole(held)
            require_batch(held, len(prompts))
            counts += [len(tokens) for tokens in held.pending]
            lengths = held.lengths + counts
            if held.lengths.any():
                what = "the prompt does not fit behind what the cache holds"
        if lengths.min() == 0:
            raise UsageError("a prompt is empty", fix="give at least one token")
        self.decoder.cache.require_room(int(lengths.max()), what)
        return counts

    def prefill(self, held: Sequences, prompts: Sequence[Ids], counts: Ids) -> Logits:
        """Feed each sequence its prompt, after what is pending; returns the logits [B, vocab] after each one's last token,
        which comes again where there is nothing to feed.

        Args:
            counts: as `counted`.
        """
        rows = [
            np.array([*tokens, *row], np.int64) for tokens, row in zip(held.pending, prompts, strict=True)
        ]
        padded = np.zeros((len(rows), counts.max()), np.int64)
        for padding, row in zip(padded, rows, strict=True):
            padding[: len(row)] = row
        after_last = np.empty((len(rows), self._vocab), np.float32)
        begin = held.lengths
        # Rows are padded on the right. What padding writes, if it is run at all, lies beyond its row's length, where no
        # token of that row looks until a later one has overwritten it.
        for start in range(0, padded.shape[1], self._chunk):
            ids = padded[:, start : start + self._chunk]
            stop = start + ids.shape[1]
            index = np.clip(counts - 1 - start, 0, ids.shape[1] - 1)[:, None]
            filled = np.clip(counts - start, 0, ids.shape[1])
            fed = np.minimum(counts, stop)
            positions, ends = (begin + start)[:, None] + np.arange(ids.shape[1]), stop == padded.shape[1]
            logits = self._call(held, int((begin + fed).max()), ids, positions, index, filled, ends)
            ends_here = (counts > start) & (counts <= stop)
            after_last[ends_here] = logits[ends_here, 0]
            held.last = np.where(fed > 0, padded[np.arange(len(rows)), fed - 1], held.last)
            held.lengths, held.pending = begin + fed, [[] for _ in rows]
        if not counts.all():
            after_last[counts == 0] = self._step(held, held.last, np.zeros(len(rows), np.bool_))[counts == 0]
        self._compress(held)
        return after_last

    def step(self, held: Sequences, token_ids: ArrayLike, active: Active | None = None) -> Logits:
        """As `Session.step`, what is pending first."""
        ids = self.checked(token_ids)
        if len(ids) != held.kv.batch:
            raise UsageError(
                "step takes one token for each sequence", got=f"{len(ids)} tokens", expected=held.kv.batch
            )
        if any(held.pending):
            waiting = np.array([bool(tokens) for tokens in held.pending])
            if active is not None:
                waiting &= active
            self._require_room(held, int((held.lengths + waiting + (1 if active is None else active)).max()))
            if waiting.any():
                self.feed_pending(held, waiting)
        return self._step(held, ids, active)

    def feed_pending(self, held: Sequences, active: Active) -> Logits:
        """Feed what is pending in the `active` sequences [B]; returns as `Session.step`."""
        ids = np.array([tokens[0] if tokens else 0 for tokens in held.pending], np.int64)
        logits = self._step(held, ids, None if active.all() else active)
        held.pending = [[] if fed else tokens for fed, tokens in zip(active, held.pending, strict=True)]
        return logits

    def score(self, held: Sequences, ids: Ids) -> Logits:
        """As `Session.score`; the sequences are empty, and there is room."""
        scored = np.empty((*ids.shape, self._vocab), np.float32)
        for start in range(0, ids.shape[1], self._chunk):
            part = ids[:, start : start + self._chunk]
            stop = start + part.shape[1]
            index = np.broadcast_to(np.arange(part.shape[1]), part.shape)
            scored[:, start:stop] = self._call(held, stop, part, start + index, index, None, False)
            held.lengths, held.last = np.full(len(ids), stop), part[:, -1]
        self._compress(held)
        return scored

    def _step(self, held: Sequences, ids: Ids, active: Active | None) -> Logits:
        """One token [B] for each sequence, or for those that are `active`."""
        start, lengths, counts = held.lengths, held.lengths + 1, None
        if active is not None:
            lengths = start + active
            start, ids = np.maximum(lengths - 1, 0), np.where(active, ids, held.last)
            if self._compress_once and not active.all():
                counts = active.astype(np.int64)
        reach = max(lengths.tolist())
        logits = self._call(
            held, reach, ids[:, None], start[:, None], np.zeros((len(ids), 1), np.int64), counts, False
        )
        held.lengths, held.last = lengths, ids
        return logits[:, 0].copy()

    def _require_room(self, held: Sequences, tokens: int) -> None:
        held.kv.require_room(tokens, "the bundle's capacity is exhausted")

    def _call(
        self,
        held: Sequences,
        reach: int,
        ids: Ids,
        positions: Ids,
        logits_index: Ids,
        lengths: Ids | None,
        shrink: bool,
    ) -> Logits:
        """As `Decoder.run`; no sequence is longer than `reach` afterwards."""
        require_whole(held)
        if self.decoder.cache is not held.kv:
            self.decoder.use(held.kv)
        held.kv.reserve(
            reach
        )  # where there is no room, nothing was done; whatever fails later leaves the cache half written
        held.broken = True
        logits = self.decoder.run(ids, positions, logits_index, lengths=lengths, shrink=shrink)
        held.broken = False
        held.changes += 1
        return logits

    def _compress(self, held: Sequences) -> None:
        if self._compress_once:
            held.kv.compress()


def require_batch(held: Sequences, prompts: int) -> None:
    """
    Raises:
        UsageError: another number of prompts than sequences.
    """
    if prompts != held.kv.batch:
        raise UsageError(
            "the cache holds another number of sequences",
            got=f"{prompts} prompts",
            expected=held.kv.batch,
            fix=f"give each sequence a prompt, or make another cache: session.new_cache(batch={prompts})",
        )
