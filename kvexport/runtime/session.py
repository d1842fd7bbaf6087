"""A bundle that generates: prompts in, logits, tokens or text out.

Knows sequences, batches and bounds; the graph call is in `decoder`, the buffers are in `cache`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from kvexport.bundle import Bundle
from kvexport.errors import CannotRunHere, UsageError
from kvexport.runtime.cache import KvCache
from kvexport.runtime.decoder import OrtDecoder
from kvexport.runtime.sampling import Sampling
from kvexport.runtime.text import Text

Prompt = str | Sequence[int]
Stop = Sequence[int] | None
Logits = NDArray[np.float32]
_CHUNK = 256  # tokens of a prompt in one call: its attention scores take chunk x capacity numbers a head


@dataclass(frozen=True)
class Generation:
    """What was generated after one prompt.

    Attributes:
        token_ids: new tokens, without the stop token.
        text: the same as text; empty where the bundle has no tokenizer.
        finish_reason: 'stop' (a stop token), 'length' (max_new_tokens), or 'capacity' (the cache is full).
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str


@dataclass
class Timing:
    """What the last generation took: tokens and wall seconds of prefill and of decoding."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0


class Session:
    """A bundle on ONNX Runtime's CPU.

    Attributes:
        bundle: the opened bundle.
        lengths: tokens in the cache, one number a sequence of the batch.
        timing: of the last `generate` or `stream`.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        """Load the graph.

        Args:
            threads: of one operator; None: one a core.

        Raises:
            CannotRunHere: the bundle's dtype has no kernels here.
        """
        if bundle.dtype == "bfloat16":
            raise CannotRunHere(
                "ONNX Runtime has no bfloat16 kernels for the CPU", seen=f"{bundle.path}, dtype bfloat16",
                fix="build it with --dtype float16 or float32; `kvexport validate` proves it here all the same",
            )  # fmt: skip
        options = session_options(threads)
        model = onnxruntime.InferenceSession(str(bundle.path / "decoder.onnx"), options, providers=["CPUExecutionProvider"])
        self.bundle = bundle
        self.timing = Timing()
        self._text: Text | None = None
        self._decoder = OrtDecoder(model, KvCache(bundle, 1, bundle.dtype))
        self.lengths = np.zeros(1, np.int64)

    def reset(self, batch: int = 1) -> None:
        """Empty the cache, for `batch` sequences from now on."""
        if batch != self._decoder.cache.batch:
            self._decoder.bind(KvCache(self.bundle, batch, self.bundle.dtype))
        self.lengths = np.zeros(batch, np.int64)

    def prefill(self, prompts: Sequence[Sequence[int]] | Sequence[int], *, chunk: int = _CHUNK) -> Logits:
        """Start anew with these prompts, of any lengths; returns the logits [B, vocab] after each one's last token.

        Raises:
            UsageError: an empty prompt, a token id outside the vocabulary, or a prompt longer than the capacity.
        """
        rows = self._rows(prompts)
        lengths = np.array([len(row) for row in rows], np.int64)
        padded = np.zeros((len(rows), int(lengths.max())), np.int64)
        for padding, row in zip(padded, rows, strict=True):
            padding[: len(row)] = row
        self.reset(len(rows))
        last = np.empty((len(rows), self.bundle.model.vocab_size), np.float32)
        # Rows are padded on the right. What padding writes lies beyond its row's length, where no token of that row
        # looks until a later one has overwritten it.
        for start in range(0, padded.shape[1], chunk):
            ids = padded[:, start : start + chunk]
            index = np.clip(lengths - 1 - start, 0, ids.shape[1] - 1)
            logits = self._run(ids, np.full(len(rows), start), index[:, None])[:, 0]
            ends_here = (lengths > start) & (lengths <= start + ids.shape[1])
            last[ends_here] = logits[ends_here]
        self.lengths = lengths
        return last

    def step(self, token_ids: Sequence[int] | NDArray[np.int64]) -> Logits:
        """One more token [B] for every sequence; returns the logits [B, vocab] after it.

        Raises:
            UsageError: a token id outside the vocabulary, another number of tokens than sequences, or a full cache.
        """
        ids = self._checked(np.asarray(token_ids, np.int64).reshape(-1, 1))
        if len(ids) != len(self.lengths):
            raise UsageError("step takes one token for each sequence", seen=f"{len(ids)} tokens", allowed=len(self.lengths))
        logits = self._run(ids, self.lengths, np.zeros_like(ids))[:, 0]
        self.lengths = self.lengths + 1
        return logits.copy()

    def score(self, token_ids: NDArray[np.int64], *, chunk: int = _CHUNK) -> Logits:
        """Logits [B, S, vocab] after every one of these tokens [B, S], teacher-forced from an empty cache.

        Raises:
            UsageError: a token id outside the vocabulary, or more tokens than the capacity.
        """
        ids = self._checked(np.asarray(token_ids, np.int64))
        self.reset(len(ids))
        parts = []
        for start in range(0, ids.shape[1], chunk):
            part = ids[:, start : start + chunk]
            index = np.broadcast_to(np.arange(part.shape[1]), part.shape)
            parts.append(self._run(part, np.full(len(ids), start), index).copy())
        self.lengths = np.full(len(ids), ids.shape[1])
        return np.concatenate(parts, axis=1)

    def generate(
        self, prompt: Prompt | Sequence[Prompt], *, max_new_tokens: int = 128, stop: Stop = None, **sampling: Any
    ) -> Any:
        """Generate after a prompt, text or token ids: a `Generation`; or after each of several: a list of them.

        Args:
            max_new_tokens: the most tokens to generate for each prompt.
            stop: token ids that end a sequence; None: the model's own.
            sampling: temperature, top_k, top_p, seed, as in `Sampling`; none: greedy.

        Raises:
            UsageError: as `prefill`, or a value out of range.
        """
        single = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], (int, np.integer)))
        prompts = [self._encode(each) for each in cast(list[Prompt], [prompt] if single else prompt)]
        rows: list[list[int]] = [[] for _ in prompts]
        reasons = ["length"] * len(prompts)
        for tokens, ended in self._tokens(prompts, max_new_tokens, stop, Sampling(**sampling)):
            for row, token in tokens.items():
                rows[row].append(token)
            for row, reason in ended.items():
                reasons[row] = reason
        text = self._tokenizer() if self._has_tokenizer() else None
        made = []
        for ids, new, reason in zip(prompts, rows, reasons, strict=True):
            stream = None if text is None else text.stream(ids)
            said = "" if stream is None else "".join([*map(stream.add, new), stream.end()])
            made.append(Generation(tuple(new), said, reason))
        return made[0] if single else made

    def stream(self, prompt: Prompt, *, max_new_tokens: int = 128, stop: Stop = None, **sampling: Any) -> Iterator[str]:
        """The text of `generate`, piece by piece as it is made; its pieces joined are the whole text.

        Raises:
            UsageError: as `generate`, or the bundle has no tokenizer.
        """
        ids = self._encode(prompt)
        text = self._tokenizer().stream(ids)
        for tokens, _ in self._tokens([ids], max_new_tokens, stop, Sampling(**sampling)):
            for token in tokens.values():
                if piece := text.add(token):
                    yield piece
        if piece := text.end():
            yield piece

    def memory(self) -> dict[str, int]:
        """KV bytes of the current batch: allocated now, in use, at the capacity limit, and per token."""
        cache = self._decoder.cache
        return {
            "kv_bytes_allocated": sum(buffer.numpy().nbytes for buffer in cache.buffers.values()),
            "kv_bytes_used": cache.bytes(1) // cache.batch * int(self.lengths.sum()),
            "kv_bytes_limit": cache.bytes(self.bundle.capacity),
            "kv_bytes_per_token": cache.bytes(1) // cache.batch,
            "capacity_allocated": cache.capacity,
            "capacity_limit": self.bundle.capacity,
        }

    def _tokens(
        self, prompts: list[list[int]], max_new_tokens: int, stop: Stop, sampling: Sampling
    ) -> Iterator[tuple[dict[int, int], dict[int, str]]]:
        """Each round's new token by row, and the rows that ended with it and why."""
        if max_new_tokens < 0:
            raise UsageError("max_new_tokens is out of range", seen=max_new_tokens, allowed="0 or more")
        stops = set(self.bundle.model.eos_token_ids if stop is None else stop)
        generators = sampling.generators(len(prompts))
        start = time.perf_counter()
        logits = self.prefill(prompts)
        self.timing = Timing(sum(map(len, prompts)), time.perf_counter() - start)
        running = set(range(len(prompts)))
        for _ in range(max_new_tokens):
            chosen = {row: sampling.choose(logits[row], generators[row]) for row in sorted(running)}
            ended = {row: "stop" for row, token in chosen.items() if token in stops}
            told = {row: token for row, token in chosen.items() if row not in ended}
            ended |= {row: "capacity" for row in told if self.lengths[row] + 1 > self.bundle.capacity}
            yield told, ended
            running -= ended.keys()
            if not running:
                return
            logits = self._advance(chosen, running)

    def _advance(self, chosen: dict[int, int], running: set[int]) -> Logits:
        """A step for the running rows; the others' slot is written with a token that nobody will look at."""
        start = time.perf_counter()
        frozen = self.lengths.copy()
        rows = len(self.lengths)
        # A row that ended stays where it is: its next slot, or its last one where the cache is full.
        self.lengths = np.minimum(frozen, self.bundle.capacity - 1)
        logits = self.step([chosen[row] if row in running else 0 for row in range(rows)])
        self.lengths = frozen + np.array([row in running for row in range(rows)])
        self.timing.decode_tokens += len(running)
        self.timing.decode_seconds += time.perf_counter() - start
        return logits

    def _run(self, ids: NDArray[np.int64], starts: NDArray[np.int64], index: NDArray[np.int64]) -> Logits:
        positions = starts[:, None] + np.arange(ids.shape[1])
        return self._decoder.run(ids, positions, np.ascontiguousarray(index))

    def _rows(self, prompts: Sequence[Any]) -> list[Sequence[int]]:
        if len(prompts) == 0:
            raise UsageError("there is no prompt")
        rows = [prompts] if isinstance(prompts[0], (int, np.integer)) else list(prompts)
        longest = max(map(len, rows))
        if min(map(len, rows)) == 0:
            raise UsageError("a prompt is empty", fix="give at least one token")
        if longest > self.bundle.capacity:
            raise UsageError(
                "the prompt is longer than the bundle's capacity",
                seen=f"{longest} tokens",
                allowed=f"at most {self.bundle.capacity}",
                fix="shorten the prompt, or build the bundle with a larger --capacity",
            )
        for row in rows:
            self._checked(np.asarray(row, np.int64))
        return rows

    def _checked(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        vocab = self.bundle.model.vocab_size
        if ids.size and not (ids.min() >= 0 and ids.max() < vocab):
            bad = ids[(ids < 0) | (ids >= vocab)][0]
            raise UsageError("a token id is outside the vocabulary", seen=int(bad), allowed=f"0 to {vocab - 1}")
        return ids

    def _has_tokenizer(self) -> bool:
        return "tokenizer.json" in self.bundle.files

    def _tokenizer(self) -> Text:
        if self._text is None:
            self._text = Text(self.bundle.path)
        return self._text

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        ids = self._tokenizer().encode(prompt)
        bos = self.bundle.model.bos_token_id
        return ids or ([bos] if bos is not None else [])


def session_options(threads: int | None) -> onnxruntime.SessionOptions:
    """Options of every session: `threads` for one operator (None: one a core)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    return options


def open_bundle(path: Path | str, *, threads: int | None = None) -> Session:
    """Open a bundle for generation on the CPU.

    Raises:
        BundleError: no bundle, a damaged one, or one of a newer format.
        CannotRunHere: its dtype has no kernels here, or onnxruntime is not installed.
    """
    return Session(Bundle.open(path), threads=threads)
