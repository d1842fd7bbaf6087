"""Tokens after prompts: chosen, fed back, and stopped for a reason; alone, in batches, or as a stream of text.

Knows when a sequence ends and what it says; the model behind it is a session that it prefills and steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from kvexport.errors import UsageError
from kvexport.runtime.sampling import Sampling
from kvexport.runtime.text import TextStream, Tokenizer

if TYPE_CHECKING:
    from kvexport.runtime.session import Session

FinishReason = Literal["stop", "length", "capacity"]


@dataclass(frozen=True)
class Generation:
    """What was generated after one prompt.

    Attributes:
        prompt_tokens: tokens of the prompt.
        token_ids: new tokens, without the stop token.
        text: the same as text; None where the bundle has no tokenizer.
        finish_reason: 'stop' (a stop token came), 'length' (max_new_tokens), or 'capacity' (no position is left: the bundle's,
            or its engine's, are all taken).
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


class TokenLoop:
    """Prefill, then a token a step for every sequence that has no reason to stop.

    Attributes:
        tokens: of each sequence, so far.
        reasons: why each sequence ended; None while it has not.
        timing: of the model's calls.
    """

    def __init__(
        self,
        session: Session,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop: Sequence[int] | None,
        sampling: Sampling,
    ) -> None:
        """Nothing is run yet.

        Raises:
            UsageError: max_new_tokens is below 1.
        """
        if max_new_tokens < 1:
            raise UsageError("max_new_tokens is out of range", seen=max_new_tokens, allowed="1 or more")
        self._session, self._prompts, self._sampling = session, prompts, sampling
        self._most = max_new_tokens
        self._stop = frozenset(session.bundle.model.eos_token_ids if stop is None else stop)
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.reasons: list[FinishReason | None] = [None] * len(prompts)
        self.timing = Timing()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Each new token with its sequence's number, as soon as it is chosen.

        Raises:
            UsageError: as `Session.prefill`.
        """
        timing, start = self.timing, time.perf_counter()
        logits = self._session.prefill(self._prompts)
        timing.prefill_tokens = int(self._session.lengths.sum())
        timing.prefill_seconds = time.perf_counter() - start
        generators = self._sampling.generators(len(self._prompts))
        chosen = np.zeros(len(self._prompts), np.int64)
        active = np.ones(len(self._prompts), np.bool_)
        while True:
            for row in np.flatnonzero(active):
                token = self._sampling.choose(logits[row], generators[row])
                chosen[row] = token
                if token not in self._stop:
                    self.tokens[row].append(token)
                    yield int(row), token
                self.reasons[row] = self._reason(int(row), token)
                active[row] = self.reasons[row] is None
            if not active.any():
                return
            start = time.perf_counter()
            logits = self._session.step(chosen, active)
            timing.decode_tokens += int(active.sum())
            timing.decode_seconds += time.perf_counter() - start

    def _reason(self, row: int, token: int) -> FinishReason | None:
        if token in self._stop:
            return "stop"
        if len(self.tokens[row]) == self._most:
            return "length"
        if self._session.lengths[row] == self._session.capacity:
            return "capacity"
        return None

    def generation(self, row: int, text: str | None) -> Generation:
        """What was generated in an ended sequence."""
        reason = self.reasons[row]
        assert reason is not None, "the sequence has not ended"
        return Generation(len(self._prompts[row]), tuple(self.tokens[row]), text, reason)


class Stream(Iterator[str]):
    """Pieces of text, each as soon as its last character is whole; joined, they are the generation's text.

    Attributes:
        generation: the whole, once the last piece was taken; None before.
    """

    def __init__(self, loop: TokenLoop, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._loop = loop
        self._pieces = self._run(TextStream(tokenizer, prompt))
        self.generation: Generation | None = None

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def timing(self) -> Timing:
        """What the model's calls took so far."""
        return self._loop.timing

    def _run(self, text: TextStream) -> Iterator[str]:
        said = []
        for _, token in self._loop:
            if piece := text.add(token):
                said.append(piece)
                yield piece
        if piece := text.end():
            said.append(piece)
            yield piece
        self.generation = self._loop.generation(0, "".join(said))


def generate(loop: TokenLoop, tokenizer: Tokenizer | None, prompts: Sequence[Sequence[int]]) -> list[Generation]:
    """Run the loop to its end; what became of each prompt."""
    for _ in loop:
        pass
    made = []
    for row, prompt in enumerate(prompts):
        said = None
        if tokenizer is not None:
            stream = TextStream(tokenizer, prompt)
            said = "".join([*map(stream.add, loop.tokens[row]), stream.end()])
        made.append(loop.generation(row, said))
    return made
