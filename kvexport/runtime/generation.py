"""Generation: tokens are chosen, run and stopped for a reason.

For one prompt, a batch, or as a stream of text.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvexport.errors import UsageError
from kvexport.runtime.lease import SequenceLease
from kvexport.runtime.sampling import Sampling, is_integer
from kvexport.runtime.tokenizer import StopTexts, TextStream, Tokenizer

FinishReason = Literal["stop", "length", "capacity"]


@dataclass(frozen=True)
class Generation:
    """The result of generating after one prompt.

    Attributes:
        prompt_tokens: number of tokens of the prompt.
        token_ids: new tokens, without the stop token. If a stop text ended the sequence, the tokens that
            complete it are included.
        text: text of the new tokens, up to the stop text; None if the bundle has no tokenizer.
        finish_reason: "stop" (a stop token or a stop text), "length" (max_new_tokens), or "capacity" (the
            sequence has the largest number of tokens of the bundle or its engine).
    """

    prompt_tokens: int
    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason


@dataclass
class Timing:
    """Tokens and seconds of a generation so far, over all its sequences.

    Attributes:
        prefill_tokens, prefill_seconds: number of prompt tokens, and the time to process them.
        decode_tokens, decode_seconds: number of tokens that were run one by one, and their time.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0


@dataclass(frozen=True)
class Stop:
    """Tokens and texts that end a sequence; they are not part of the result."""

    tokens: frozenset[int]
    texts: tuple[str, ...]

    @classmethod
    def of(cls, stop: str | Sequence[int | str] | None, eos: Sequence[int], vocab_size: int) -> Stop:
        """As `Session.generate` takes `stop`; `eos`: the model's own end-of-sequence tokens.

        Raises:
            UsageError: an entry is neither a text nor a token id of the vocabulary.
        """
        entries = [stop] if isinstance(stop, str) else [] if stop is None else stop
        if not isinstance(entries, Iterable) or isinstance(entries, bytes):
            raise UsageError("stop must be a list of token ids and texts", got=repr(stop)[:80])
        for each in entries:
            if not isinstance(each, str) and not (is_integer(each) and 0 <= each < vocab_size):
                raise UsageError(
                    "stop must be a list of token ids and texts",
                    got=repr(each)[:80],
                    expected=f"texts, and token ids from 0 to {vocab_size - 1}",
                )
        texts = tuple(each for each in entries if isinstance(each, str))
        tokens = frozenset(int(each) for each in entries if not isinstance(each, str))
        return cls(tokens if tokens or (stop is not None and not texts) else frozenset(eos), texts)


class SequenceText:
    """The new text of a sequence, piece by piece, up to a stop text.

    Attributes:
        pieces: returned so far.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], stops: Sequence[str]) -> None:
        """
        Args:
            tokenizer: decodes tokens.
            context: tokens before the first new one.
            stops: texts that end the sequence.

        Raises:
            UsageError: a stop text is empty.
        """
        self._stream, self._stops = TextStream(tokenizer, context), StopTexts(stops)
        self.pieces: list[str] = []

    def add(self, token: int) -> str:
        """The text that becomes certain with this token."""
        return self._append(self._stops.add(self._stream.add(token)))

    def end(self) -> str:
        """The remaining text, when no token follows."""
        return self._append(self._stops.add(self._stream.end()) + self._stops.end())

    @property
    def stopped(self) -> bool:
        """Whether a stop text appeared."""
        return self._stops.matched

    def _append(self, piece: str) -> str:
        if piece:
            self.pieces.append(piece)
        return piece


class TokenLoop:
    """Prefill, then one token per step for every sequence that has not finished.

    Attributes:
        tokens: new tokens of each sequence.
        reasons: why each sequence finished; None while it has not.
        timing: times of the calls of the model.
    """

    def __init__(
        self,
        lease: SequenceLease,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop: Stop,
        sampling: Sampling,
        tokenizer: Tokenizer | None,
    ) -> None:
        """Nothing is run yet. Without a tokenizer there is no text and no stop text.

        Raises:
            UsageError: max_new_tokens is below 1, or a stop text is empty.
        """
        if not is_integer(max_new_tokens) or max_new_tokens < 1:
            raise UsageError("max_new_tokens must be at least 1", got=max_new_tokens)
        self._lease, self._prompts, self._sampling = lease, prompts, sampling
        self._max_new_tokens, self._stop_tokens = max_new_tokens, stop.tokens
        self._texts = [
            None if tokenizer is None else SequenceText(tokenizer, [*lease.context(row), *prompt], stop.texts)
            for row, prompt in enumerate(prompts)
        ]
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.reasons: list[FinishReason | None] = [None] * len(prompts)
        self.timing = Timing()

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Run, and yield (sequence, text) as soon as a token is chosen; the text may be empty.

        Raises:
            UsageError: as `Session.prefill`, or another call has changed the sequences.
        """
        timing, start = self.timing, time.perf_counter()
        logits, timing.prefill_tokens = self._lease.prefill(self._prompts)  # [B, vocab]
        timing.prefill_seconds = time.perf_counter() - start
        generators = self._sampling.generators(len(self._prompts))
        active = np.ones(len(self._prompts), np.bool_)
        while True:
            for row in np.flatnonzero(active).tolist():
                piece = self._take(row, self._sampling.choose(logits[row], generators[row]))
                active[row] = self.reasons[row] is None
                yield row, piece
            if not active.any():
                return
            start = time.perf_counter()
            logits = self._lease.advance(active)
            timing.decode_tokens += int(active.sum())
            timing.decode_seconds += time.perf_counter() - start

    def _take(self, row: int, token: int) -> str:
        """Add a token to a sequence, or finish it; returns its new text."""
        text, piece = self._texts[row], ""
        if token not in self._stop_tokens:
            self._lease.choose(row, token)
            self.tokens[row].append(token)
            piece = "" if text is None else text.add(token)
        self.reasons[row] = self._reason(row, token)
        if text is not None and self.reasons[row] is not None:
            piece += text.end()
        return piece

    def _reason(self, row: int, token: int) -> FinishReason | None:
        text = self._texts[row]
        if token in self._stop_tokens or (text is not None and text.stopped):
            return "stop"
        if len(self.tokens[row]) == self._max_new_tokens:
            return "length"
        if self._lease.length(row) == self._lease.capacity:
            return "capacity"
        return None

    def generation(self, row: int) -> Generation:
        """The result of a sequence that has finished."""
        reason, text = self.reasons[row], self._texts[row]
        assert reason is not None, "the sequence must have finished"
        joined = None if text is None else "".join(text.pieces)
        return Generation(len(self._prompts[row]), tuple(self.tokens[row]), joined, reason)


class Stream(Iterator[str]):
    """An iterator over the text of a generation, from `Session.stream`.

    Each piece is returned as soon as its last character is complete; joined, they are the text of the
    generation.

    Attributes:
        generation: the result after the last piece; None before.
    """

    def __init__(self, loop: TokenLoop) -> None:
        self._loop = loop
        self._pieces = self._run()
        self.generation: Generation | None = None

    def __next__(self) -> str:
        """The next piece of text.

        Raises:
            UsageError: as `Session.generate`, or another call has changed the sequence.
            BundleError: a logit is not finite.
        """
        return next(self._pieces)

    @property
    def timing(self) -> Timing:
        """Tokens and seconds so far."""
        return self._loop.timing

    def _run(self) -> Iterator[str]:
        for _, piece in self._loop:
            if piece:
                yield piece
        self.generation = self._loop.generation(0)


def generate(loop: TokenLoop) -> list[Generation]:
    """Run a loop to its end; returns the result of each prompt."""
    for _ in loop:
        pass
    return [loop.generation(row) for row in range(len(loop.reasons))]
