"""Tokens after prompts: chosen, fed back, and stopped for a reason; alone, in batches, or as a stream of text.

Knows when a sequence ends and what it says; the model is behind the sequences that it holds, which it
prefills and steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvexport.errors import UsageError
from kvexport.runtime.lease import SequenceLease
from kvexport.runtime.sampling import Sampling, is_whole
from kvexport.runtime.tokenizer import StopTexts, TextStream, Tokenizer

FinishReason = Literal["stop", "length", "capacity"]


@dataclass(frozen=True)
class Generation:
    """What was generated after one prompt.

    Attributes:
        prompt_tokens: tokens of the prompt.
        token_ids: new tokens, without the stop token; where a text ended the sequence, those that complete it
            included.
        text: the same as text, up to the text that ended it; None where the bundle has no tokenizer.
        finish_reason: 'stop' (a stop token came, or a text to stop at), 'length' (max_new_tokens), or
            'capacity' (no position
            is left: the bundle's, or its engine's, are all taken).
    """

    prompt_tokens: int
    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason


@dataclass
class Timing:
    """What a generation took so far, all its sequences together."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0


@dataclass(frozen=True)
class Stop:
    """What ends a sequence, and is not part of what is said."""

    tokens: frozenset[int]
    texts: tuple[str, ...]

    @classmethod
    def of(cls, stop: str | Sequence[int | str] | None, own: Sequence[int], vocab_size: int) -> Stop:
        """As `Session.generate` takes it; `own` are the model's tokens.

        Raises:
            UsageError: neither texts nor token ids of the vocabulary.
        """
        given = [stop] if isinstance(stop, str) else [] if stop is None else stop
        if not isinstance(given, Iterable) or isinstance(given, bytes):
            raise UsageError("stop is no list", got=repr(stop)[:80], expected="token ids and texts")
        for each in given:
            if not isinstance(each, str) and not (is_whole(each) and 0 <= each < vocab_size):
                allowed = f"texts, and token ids from 0 to {vocab_size - 1}"
                raise UsageError("stop has what no sequence ends with", got=repr(each)[:80], expected=allowed)
        texts = tuple(each for each in given if isinstance(each, str))
        tokens = frozenset(int(each) for each in given if not isinstance(each, str))
        return cls(tokens if tokens or (stop is not None and not texts) else frozenset(own), texts)


class _Said:
    """A sequence's new text, piece by piece, up to a text that ends it."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], texts: Sequence[str]) -> None:
        self._stream, self._until = TextStream(tokenizer, prompt), StopTexts(texts)
        self.pieces: list[str] = []

    def add(self, token: int) -> str:
        return self._say(self._until.add(self._stream.add(token)))

    def end(self) -> str:
        """What is left when no token follows."""
        return self._say(self._until.add(self._stream.end()) + self._until.end())

    @property
    def stopped(self) -> bool:
        return self._until.found

    def _say(self, piece: str) -> str:
        if piece:
            self.pieces.append(piece)
        return piece


class TokenLoop:
    """Prefill, then a token a step for every sequence that has no reason to stop.

    Attributes:
        tokens: of each sequence, so far.
        reasons: why each sequence ended; None while it has not.
        timing: of the model's calls.
    """

    def __init__(
        self,
        held: SequenceLease,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop: Stop,
        sampling: Sampling,
        tokenizer: Tokenizer | None,
    ) -> None:
        """Nothing is run yet. Without a tokenizer there is no text, nor one to stop at.

        Raises:
            UsageError: max_new_tokens is below 1, or a text to stop at is empty.
        """
        if not is_whole(max_new_tokens) or max_new_tokens < 1:
            raise UsageError("max_new_tokens is out of range", got=max_new_tokens, expected="1 or more")
        self._held, self._prompts, self._sampling = held, prompts, sampling
        self._most, self._stop = max_new_tokens, stop.tokens
        self._said = [
            None if tokenizer is None else _Said(tokenizer, [*held.context(row), *prompt], stop.texts)
            for row, prompt in enumerate(prompts)
        ]
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.reasons: list[FinishReason | None] = [None] * len(prompts)
        self.timing = Timing()

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Each new token's text with its sequence's number, as soon as the token is chosen; empty while nothing can be said.

        Raises:
            UsageError: as `Session.prefill`, or another call has used the sequences.
        """
        timing, start = self.timing, time.perf_counter()
        logits, timing.prefill_tokens = self._held.prefill(self._prompts)
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
            logits = self._held.advance(active)
            timing.decode_tokens += int(active.sum())
            timing.decode_seconds += time.perf_counter() - start

    def _take(self, row: int, token: int) -> str:
        """What a sequence says with its next token, and, if it ends with it, why and what is left to say."""
        said, piece = self._said[row], ""
        if token not in self._stop:
            self._held.choose(row, token)
            self.tokens[row].append(token)
            piece = "" if said is None else said.add(token)
        self.reasons[row] = self._reason(row, token)
        if said is not None and self.reasons[row] is not None:
            piece += said.end()
        return piece

    def _reason(self, row: int, token: int) -> FinishReason | None:
        said = self._said[row]
        if token in self._stop or (said is not None and said.stopped):
            return "stop"
        if len(self.tokens[row]) == self._most:
            return "length"
        if self._held.length(row) == self._held.capacity:
            return "capacity"
        return None

    def generation(self, row: int) -> Generation:
        """What was generated in an ended sequence."""
        reason, said = self.reasons[row], self._said[row]
        assert reason is not None, "the sequence has not ended"
        text = None if said is None else "".join(said.pieces)
        return Generation(len(self._prompts[row]), tuple(self.tokens[row]), text, reason)


class Stream(Iterator[str]):
    """Pieces of text, each as soon as its last character is whole; joined, they are the generation's text.

    Attributes:
        generation: the whole, once the last piece was taken; None before.
    """

    def __init__(self, loop: TokenLoop) -> None:
        self._loop = loop
        self._pieces = self._run()
        self.generation: Generation | None = None

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def timing(self) -> Timing:
        """What the model's calls took so far."""
        return self._loop.timing

    def _run(self) -> Iterator[str]:
        for _, piece in self._loop:
            if piece:
                yield piece
        self.generation = self._loop.generation(0)


def generate(loop: TokenLoop) -> list[Generation]:
    """Run the loop to its end; what became of each prompt."""
    for _ in loop:
        pass
    return [loop.generation(row) for row in range(len(loop.reasons))]
