"""Runs token ids on a decoder: checked, in chunks, at the positions where each sequence continues."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvexport.bundle import Bundle
from kvexport.errors import UsageError
from kvexport.runtime.backends.base import Decoder
from kvexport.runtime.cache.sequences import Sequences, require_defined
from kvexport.runtime.types import Ids, Logits

Active = NDArray[np.bool_]


class PromptRunner:
    """Runs prompts and single tokens of a batch of sequences.

    Attributes:
        decoder: what runs them.
    """

    def __init__(self, bundle: Bundle, decoder: Decoder, chunk: int, *, compress_once: bool) -> None:
        """
        Args:
            chunk: the largest number of tokens of a sequence in one call.
            compress_once: as in `Session`.
        """
        self.decoder, self._compress_once = decoder, compress_once
        self._vocab = bundle.model.vocab_size
        self._chunk = min(chunk, decoder.max_tokens_per_call)
        if bundle.eviction is not None and not compress_once:
            self._chunk = min(self._chunk, bundle.eviction.chunk)

    def checked(self, token_ids: ArrayLike, dimensions: int = 1) -> Ids:
        """Token ids as an int64 array of so many dimensions.

        Raises:
            UsageError: they are not integers, have another shape, or are outside the vocabulary.
        """
        try:
            ids = np.asarray(token_ids)
        except ValueError as error:  # rows of different lengths
            raise UsageError(
                "token ids must be an array whose rows have the same length", got=str(error)
            ) from error
        if not ids.size:
            ids = ids.astype(np.int64)
        if ids.ndim != dimensions or ids.dtype.kind not in "iu":
            raise UsageError(
                f"token ids must be integers in an array of {dimensions} dimension{'s' * (dimensions > 1)}",
                got=f"{ids.dtype} in {ids.ndim} dimensions",
            )
        flat = ids.ravel().tolist()  # min and max of a few numbers are faster in Python than in numpy
        if flat and not 0 <= min(flat) <= max(flat) < self._vocab:
            wrong = next(token for token in flat if not 0 <= token < self._vocab)
            raise UsageError(
                "token ids must be inside the vocabulary", got=wrong, expected=f"0 to {self._vocab - 1}"
            )
        return ids.astype(np.int64, copy=False)

    def counted(self, sequences: Sequences | None, prompts: Sequence[Ids]) -> Ids:
        """The number of tokens that each prompt adds to its sequence, pending ones included, int64 [B].

        Args:
            sequences: None: new, empty ones.

        Raises:
            UsageError: a prompt is empty and so is its sequence, the number of prompts differs from the
                number of sequences, or the tokens do not fit.
        """
        counts = np.array([len(row) for row in prompts], np.int64)
        lengths, what = counts, "the prompt must fit the capacity"
        if sequences is not None:
            require_defined(sequences)
            require_batch(sequences, len(prompts))
            counts += [len(tokens) for tokens in sequences.pending]
            lengths = sequences.lengths + counts
            if sequences.lengths.any():
                what = "the prompt must fit behind the tokens in the cache"
        if lengths.min() == 0:
            raise UsageError("a prompt must not be empty", fix="give at least one token")
        self.decoder.cache.require_room(int(lengths.max()), what)
        return counts

    def prefill(self, sequences: Sequences, prompts: Sequence[Ids], counts: Ids) -> Logits:
        """Run the pending token and the prompt of each sequence.

        Args:
            counts: as `counted` returns.

        Returns:
            Logits [B, vocab] after the last token of each. Where there is nothing to run, the last token is
            run again.
        """
        rows = [
            np.array([*tokens, *row], np.int64)
            for tokens, row in zip(sequences.pending, prompts, strict=True)
        ]
        padded = np.zeros((len(rows), counts.max()), np.int64)  # [B, S]
        for padding, row in zip(padded, rows, strict=True):
            padding[: len(row)] = row
        after_last = np.empty((len(rows), self._vocab), np.float32)  # [B, vocab]
        begin = sequences.lengths
        # Rows are padded on the right. A padding token that is run writes behind its row's length, where no
        # token of that row attends before a later one has overwritten it. With rings, none is run.
        stop = 0
        while stop < padded.shape[1]:
            start = stop
            running = (begin + start)[counts > start]
            stop += self._tokens_of_call(sequences, running, padded.shape[1] - start)
            ids = padded[:, start:stop]
            index = np.clip(counts - 1 - start, 0, ids.shape[1] - 1)[:, None]
            filled = np.clip(counts - start, 0, ids.shape[1])
            done = np.minimum(counts, stop)
            positions, last = (begin + start)[:, None] + np.arange(ids.shape[1]), stop == padded.shape[1]
            logits = self._call(sequences, int((begin + done).max()), ids, positions, index, filled, last)
            ends_here = (counts > start) & (counts <= stop)
            after_last[ends_here] = logits[ends_here, 0]
            sequences.last = np.where(done > 0, padded[np.arange(len(rows)), done - 1], sequences.last)
            sequences.lengths, sequences.pending = begin + done, [[] for _ in rows]
        if not counts.all():
            again = self._step(sequences, sequences.last, np.zeros(len(rows), np.bool_))
            after_last[counts == 0] = again[counts == 0]
        self._compress(sequences)
        return after_last

    def step(self, sequences: Sequences, token_ids: ArrayLike, active: Active | None = None) -> Logits:
        """As `Session.step`; pending tokens are run first."""
        ids = self.checked(token_ids)
        if len(ids) != sequences.kv.batch:
            raise UsageError(
                "step must get one token for each sequence",
                got=f"{len(ids)} tokens",
                expected=sequences.kv.batch,
            )
        if any(sequences.pending):
            pending = np.array([bool(tokens) for tokens in sequences.pending])
            if active is not None:
                pending &= active
            lengths = sequences.lengths + pending + (1 if active is None else active)
            self._require_room(sequences, int(lengths.max()))
            if pending.any():
                self.run_pending(sequences, pending)
        return self._step(sequences, ids, active)

    def run_pending(self, sequences: Sequences, active: Active) -> Logits:
        """Run the pending tokens of the `active` sequences [B]; returns as `Session.step`."""
        ids = np.array([tokens[0] if tokens else 0 for tokens in sequences.pending], np.int64)
        logits = self._step(sequences, ids, None if active.all() else active)
        sequences.pending = [
            [] if done else tokens for done, tokens in zip(active, sequences.pending, strict=True)
        ]
        return logits

    def score(self, sequences: Sequences, ids: Ids) -> Logits:
        """As `Session.score`, in empty sequences that the tokens fit."""
        scored = np.empty((*ids.shape, self._vocab), np.float32)  # [B, S, vocab]
        for call in sequences.kv.rings.calls(range(ids.shape[1]), self._chunk):
            start, stop = call.start, call.stop
            part = ids[:, start:stop]
            index = np.broadcast_to(np.arange(part.shape[1]), part.shape)
            scored[:, start:stop] = self._call(sequences, stop, part, start + index, index, None, False)
            sequences.lengths, sequences.last = np.full(len(ids), stop), part[:, -1]
        self._compress(sequences)
        return scored

    def _step(self, sequences: Sequences, ids: Ids, active: Active | None) -> Logits:
        """Run one token [B] of each sequence; None: all are active."""
        start, lengths, counts = sequences.lengths, sequences.lengths + 1, None
        if active is not None:
            lengths = start + active
            start, ids = np.maximum(lengths - 1, 0), np.where(active, ids, sequences.last)
            if self._compress_once and not active.all():
                counts = active.astype(np.int64)
        reach = max(lengths.tolist())
        index = np.zeros((len(ids), 1), np.int64)
        logits = self._call(sequences, reach, ids[:, None], start[:, None], index, counts, False)
        sequences.lengths, sequences.last = lengths, ids
        return logits[:, 0].copy()

    def _tokens_of_call(self, sequences: Sequences, first: Ids, count: int) -> int:
        """The number of tokens, at most `count`, of the next call, from positions `first` on."""
        return sequences.kv.rings.tokens_of_call(first, min(self._chunk, count))

    def _require_room(self, sequences: Sequences, tokens: int) -> None:
        sequences.kv.require_room(tokens, "the sequence must fit the capacity")

    def _call(
        self,
        sequences: Sequences,
        reach: int,
        ids: Ids,
        positions: Ids,
        logits_index: Ids,
        lengths: Ids | None,
        shrink: bool,
    ) -> Logits:
        """As `Decoder.run`. `reach`: the length of the longest sequence afterwards."""
        require_defined(sequences)
        if self.decoder.cache is not sequences.kv:
            self.decoder.use(sequences.kv)
        # A failure before this line leaves the cache as it was; one after it leaves the cache half written.
        sequences.kv.reserve(reach)
        sequences.undefined = True
        logits = self.decoder.run(ids, positions, logits_index, lengths=lengths, shrink=shrink)
        sequences.undefined = False
        sequences.changes += 1
        return logits

    def _compress(self, sequences: Sequences) -> None:
        if self._compress_once:
            sequences.kv.compress()


def require_batch(sequences: Sequences, prompts: int) -> None:
    """
    Raises:
        UsageError: the number of prompts differs from the number of sequences.
    """
    if prompts != sequences.kv.batch:
        raise UsageError(
            "there must be one prompt for each sequence of the cache",
            got=f"{prompts} prompts",
            expected=sequences.kv.batch,
            fix=f"give one prompt per sequence, or create another cache: session.new_cache(batch={prompts})",
        )
