"""A bundle that generates: prompts in, logits, tokens or text out.

Knows sequences, batches and bounds; what runs the model is chosen in `providers`, the buffers are in `cache`, the loop
from token to token is in `generation`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvexport.bundle import DATA_FILE, Bundle
from kvexport.errors import UsageError
from kvexport.runtime.generation import Generation, Stream, TokenLoop, generate
from kvexport.runtime.interface import DeviceMemory, Ids, Logits
from kvexport.runtime.providers import Provider, choose, open_decoder
from kvexport.runtime.sampling import Sampling
from kvexport.runtime.text import Tokenizer, tokenizer_of

Prompt = str | Sequence[int]
CHUNK = 128  # tokens of a prompt in one call: as fast as more, and the scores of its attention take half of what 256 take


@dataclass(frozen=True)
class Memory:
    """KV bytes of a session's current batch.

    Attributes:
        batch: sequences.
        capacity, capacity_limit: tokens that each sequence has room for now, and may ever hold.
        bytes_allocated, bytes_limit: what the cache takes now, and will take at the limit.
        bytes_per_token: what one token of one sequence takes, with its state in layers that evict.
        budget: tokens of a sequence that layers hold which evict; None: no layer does.
        layers: bytes allocated now, layer by layer.
        device: all that is known of the device's memory; None where the session runs on the CPU.
    """

    batch: int
    capacity: int
    capacity_limit: int
    bytes_allocated: int
    bytes_limit: int
    bytes_per_token: int
    budget: int | None
    layers: tuple[int, ...]
    device: DeviceMemory | None


class Session:
    """A bundle that runs, with the cache of one batch of sequences. Not for several threads at a time.

    Attributes:
        bundle: the opened bundle.
        provider: what runs it: "cpu" or "cuda" (ONNX Runtime's), or "tensorrt".
        engine: that library and its version.
        capacity: the most tokens that a sequence may ever have: the bundle's, or its engine's.
        lengths: tokens that each sequence had, all of which are in the cache, but for those that were evicted.
    """

    def __init__(
        self, bundle: Bundle, *, provider: str | Provider = "auto", threads: int | None = None, chunk: int = CHUNK,
        compress_once: bool = False,
    ) -> None:  # fmt: skip
        """Load the graph or the engine; hashes nothing (see `open_bundle`).

        Args:
            provider: "cpu", "cuda" or "tensorrt"; "auto": tensorrt if the bundle has an engine that this machine can run,
                else cuda if ONNX Runtime has it and there is a GPU, else cpu. Or what `providers.choose` made of it.
            threads: that one operator may use on the CPU; None: one a core.
            chunk: the most tokens of a sequence in one call; an engine may take fewer, and layers that evict do.
            compress_once: as arXiv 2406.11430 measures, for comparison: a prompt is read as if nothing were evicted, in
                buffers as large as it, and brought within the bundle's budget at once.

        Raises:
            CannotRunHere: this machine lacks what the provider needs, or kernels for the bundle's dtype.
            BundleError: the graph, the engine or the tokenizer is not what the manifest says.
            UsageError: a value out of range, or `compress_once` of what cannot.
        """
        if chunk < 1:
            raise UsageError("chunk is out of range", seen=chunk, allowed="1 or more")
        if compress_once and bundle.eviction is None:
            raise UsageError(
                f"the bundle {bundle.path} has no budget to bring a prompt within",
                fix="build it with one: kvexport build --kv-budget TOKENS",
            )
        chosen = choose(bundle, provider) if isinstance(provider, str) else provider
        if compress_once and chosen.name == "tensorrt":
            raise UsageError(
                "an engine's cache has the size of the budget from the start, and cannot hold a longer prompt whole",
                seen="compress_once", fix="leave it out, or run without the engine: --provider cuda or cpu",
            )  # fmt: skip
        self.bundle, self.provider, self._compress_once = bundle, chosen.name, compress_once
        self._decoder = open_decoder(bundle, chosen, threads=threads)
        self.engine = chosen.version
        self._chunk = min(chunk, self._decoder.longest)
        if bundle.eviction is not None and not compress_once:
            self._chunk = min(self._chunk, bundle.eviction.chunk)
        self._tokenizer = tokenizer_of(bundle)
        self.reset()

    def reset(self, batch: int = 1) -> None:
        """Give the cache back, and begin with `batch` empty sequences."""
        if batch < 1:
            raise UsageError("the batch is empty", seen=batch, allowed="1 sequence or more")
        self._begin(batch)

    def _begin(self, batch: int, tokens: int = 0) -> None:
        """An empty cache, which with `compress_once` holds so many tokens of a sequence before any goes."""
        slots = None
        if self._compress_once:
            assert self.bundle.eviction is not None
            slots = max(tokens, self.bundle.eviction.budget)
        self._decoder.use(self._decoder.cache.fresh(batch, slots))
        self.lengths = np.zeros(batch, np.int64)
        self._last = np.zeros(batch, np.int64)  # the last token of each

    @property
    def capacity(self) -> int:
        return self._decoder.cache.limit

    def prefill(self, prompts: Sequence[Sequence[int]] | Sequence[int]) -> Logits:
        """Start anew with these prompts, token ids of any lengths; returns the logits [B, vocab] after each one's last.

        Raises:
            UsageError: an empty prompt, a token id outside the vocabulary, or a prompt longer than the capacity.
        """
        rows = [self._checked_ids(row) for row in _batched(prompts)]
        lengths = np.array([len(row) for row in rows], np.int64)
        if lengths.min() == 0:
            raise UsageError("a prompt is empty", fix="give at least one token")
        self._decoder.cache.require_room(int(lengths.max()), "the prompt is longer than the bundle's capacity")
        self._begin(len(rows), int(lengths.max()))
        padded = np.zeros((len(rows), lengths.max()), np.int64)
        for padding, row in zip(padded, rows, strict=True):
            padding[: len(row)] = row
        after_last = np.empty((len(rows), self.bundle.model.vocab_size), np.float32)
        # Rows are padded on the right. What padding writes, if it is run at all, lies beyond its row's length, where no
        # token of that row looks until a later one has overwritten it.
        for start in range(0, padded.shape[1], self._chunk):
            ids = padded[:, start : start + self._chunk]
            stop = start + ids.shape[1]
            index = np.clip(lengths - 1 - start, 0, ids.shape[1] - 1)[:, None]
            filled = np.clip(lengths - start, 0, ids.shape[1])
            logits = self._run(np.full(len(rows), start), ids, index, lengths=filled, shrink=stop == padded.shape[1])
            ends_here = (lengths > start) & (lengths <= stop)
            after_last[ends_here] = logits[ends_here, 0]
        self._end_prompt(lengths, np.array([row[-1] for row in rows]))
        return after_last

    def step(self, token_ids: ArrayLike, active: NDArray[np.bool_] | None = None) -> Logits:
        """One more token [B] for every sequence; returns the logits [B, vocab] after it.

        Sequences that are not `active` [B] stay as they are: whatever their token here, their last one is run again
        in its place. With `compress_once` it may be gone: they are left out, and their logits are zeros.

        Raises:
            UsageError: a token id outside the vocabulary, another number of tokens than sequences, or a full cache.
        """
        ids = self._checked_ids(token_ids)
        if len(ids) != len(self.lengths):
            raise UsageError("step takes one token for each sequence", seen=f"{len(ids)} tokens", allowed=len(self.lengths))
        active = np.ones(len(ids), np.bool_) if active is None else active
        lengths = self.lengths + active
        self._decoder.cache.require_room(int(lengths.max()), "the bundle's capacity is exhausted")
        ids = np.where(active, ids, self._last)
        counts = active.astype(np.int64) if self._compress_once and not active.all() else None
        logits = self._run(np.maximum(lengths - 1, 0), ids[:, None], np.zeros((len(ids), 1), np.int64), lengths=counts)
        self.lengths, self._last = lengths, ids
        return logits[:, 0].copy()

    def score(self, token_ids: ArrayLike) -> Logits:
        """Logits [B, S, vocab] after every one of these tokens [B, S], teacher-forced from an empty cache.

        Raises:
            UsageError: no token, a token id outside the vocabulary, or more tokens than the capacity.
        """
        ids = self._checked_ids(token_ids, dimensions=2)
        if ids.size == 0:
            raise UsageError("there is no token to score", seen=f"shape {ids.shape}")
        self._decoder.cache.require_room(ids.shape[1], "the tokens exceed the bundle's capacity")
        self._begin(len(ids), ids.shape[1])
        scored = np.empty((*ids.shape, self.bundle.model.vocab_size), np.float32)
        for start in range(0, ids.shape[1], self._chunk):
            part = ids[:, start : start + self._chunk]
            index = np.broadcast_to(np.arange(part.shape[1]), part.shape)
            scored[:, start : start + self._chunk] = self._run(np.full(len(ids), start), part, index)
        self._end_prompt(np.full(len(ids), ids.shape[1]), ids[:, -1])
        return scored

    def _end_prompt(self, lengths: Ids, last: Ids) -> None:
        self.lengths, self._last = lengths, last
        if self._compress_once:
            self._decoder.use(self._decoder.cache)  # or it would hold the larger buffers
            self._decoder.cache.compress()

    @overload
    def generate(
        self, prompt: str | Sequence[int], *, max_new_tokens: int = ..., temperature: float | None = ..., top_k: int | None = ...,
        top_p: float | None = ..., seed: int | None = ..., stop: Sequence[int] | None = ...,
    ) -> Generation: ...  # fmt: skip
    @overload
    def generate(
        self, prompt: list[str] | Sequence[Sequence[int]], *, max_new_tokens: int = ..., temperature: float | None = ...,
        top_k: int | None = ..., top_p: float | None = ..., seed: int | None = ..., stop: Sequence[int] | None = ...,
    ) -> list[Generation]: ...  # fmt: skip
    def generate(
        self,
        prompt: Prompt | list[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 128,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[int] | None = None,
    ) -> Generation | list[Generation]:
        """Generate after a prompt, text or token ids; or after each of several, all at once.

        Args:
            max_new_tokens: the most tokens to generate for each prompt.
            temperature: 0 takes the likeliest token; above it tokens are drawn, the likeliest less often the higher it is.
                None: 1 where top_k or top_p is given, else 0.
            top_k, top_p: draw from the K likeliest tokens, and of those from the likeliest that reach this probability.
            seed: makes draws repeatable; a prompt draws the same whatever is behind it in a batch.
            stop: token ids that end a sequence; None: the model's own.

        Raises:
            UsageError: as `prefill`, a value out of range, or text where the bundle has no tokenizer.
            BundleError: the model's logits are not finite.
        """
        single = isinstance(prompt, str) or _is_ids(prompt)
        prompts = [self._encode(each) for each in cast("list[Prompt]", [prompt] if single else prompt)]
        loop = TokenLoop(self, prompts, max_new_tokens, stop, _sampling(temperature, top_k, top_p, seed))
        made = generate(loop, self._tokenizer, prompts)
        return made[0] if single else made

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[int] | None = None,
    ) -> Stream:
        """The text of `generate`, with its arguments, piece by piece as it is made.

        Raises:
            UsageError: as `generate`, or the bundle has no tokenizer.
        """
        tokenizer, ids = self._require_tokenizer(), self._encode(prompt)
        loop = TokenLoop(self, [ids], max_new_tokens, stop, _sampling(temperature, top_k, top_p, seed))
        return Stream(loop, tokenizer, ids)

    def memory(self) -> Memory:
        """What the cache takes, and may take; an engine's has its whole capacity from the start."""
        cache = self._decoder.cache
        return Memory(
            batch=cache.batch,
            capacity=cache.capacity,
            capacity_limit=cache.limit,
            bytes_allocated=sum(cache.layer_bytes()),
            bytes_limit=cache.bytes(cache.limit),
            bytes_per_token=self.bundle.kv_bytes(1),
            budget=cache.slots,
            layers=cache.layer_bytes(),
            device=self._decoder.device_memory(),
        )

    def _run(
        self, start: Ids, ids: Ids, logits_index: Ids, *, lengths: Ids | None = None, shrink: bool = False
    ) -> Logits:  # fmt: skip
        """Tokens [B, S] at the positions from start[b] on."""
        positions = start[:, None] + np.arange(ids.shape[1])
        return self._decoder.run(ids, positions, logits_index, lengths=lengths, shrink=shrink)

    def _checked_ids(self, token_ids: ArrayLike, dimensions: int = 1) -> Ids:
        """Token ids as an int64 array.

        Raises:
            UsageError: not integers, another shape, or outside the vocabulary.
        """
        vocab = self.bundle.model.vocab_size
        try:
            ids = np.asarray(token_ids)
        except ValueError as error:  # rows of several lengths
            raise UsageError(f"token ids are not an array: {error}") from error
        if ids.size == 0:
            ids = ids.astype(np.int64)
        if ids.ndim != dimensions or ids.dtype.kind not in "iu":
            raise UsageError(
                "token ids are whole numbers in rows of one length", seen=f"{ids.dtype} of {ids.ndim} dimensions",
                allowed=f"integers of {dimensions}",
            )  # fmt: skip
        wrong = ids[(ids < 0) | (ids >= vocab)]
        if wrong.size:
            raise UsageError("a token id is outside the vocabulary", seen=int(wrong[0]), allowed=f"0 to {vocab - 1}")
        return ids.astype(np.int64)

    def _require_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise UsageError(
                f"the bundle {self.bundle.path} has no tokenizer, so it takes and gives token ids only",
                fix="call generate with token ids, or add tokenizer.json to the checkpoint and build again",
            )
        return self._tokenizer

    def _encode(self, prompt: Prompt) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        bos = self.bundle.model.bos_token_id
        return self._require_tokenizer().encode(prompt) or ([] if bos is None else [bos])


def _sampling(temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None) -> Sampling:
    if temperature is None:
        temperature = 0.0 if top_k is None and top_p is None else 1.0
    return Sampling(temperature, top_k, top_p, seed)


def _is_ids(prompt: object) -> bool:
    return isinstance(prompt, Iterable) and all(isinstance(each, (int, np.integer)) for each in prompt)


def _batched(prompts: Sequence[Any]) -> Sequence[Any]:
    if len(prompts) == 0:
        raise UsageError("there is no prompt", fix="give at least one token")
    return [prompts] if _is_ids(prompts) else prompts


def open_bundle(
    path: Path | str, *, provider: str = "auto", threads: int | None = None, chunk: int = CHUNK, compress_once: bool = False,
    verify: bool = True,
) -> Session:  # fmt: skip
    """Open a bundle for generation.

    Args:
        provider, threads, chunk, compress_once: as in `Session`.
        verify: hash the weights too (an engine's plan, where it is that which runs), while they are loaded; all other
            files always are.

    Raises:
        BundleError: no bundle, a damaged one, one of a newer format, or an engine that is damaged or of another bundle.
        CannotRunHere: this machine lacks what the provider needs, or kernels for the bundle's dtype.
        UsageError: as `Session`.
    """
    bundle = Bundle.open(path)
    bundle.verify(name for name in bundle.files if name != DATA_FILE)
    chosen = choose(bundle, provider)
    with ThreadPoolExecutor(1) as pool:
        hashed = pool.submit(_verify_weights, bundle, chosen) if verify else pool.submit(lambda: None)
        try:
            session = Session(bundle, provider=chosen, threads=threads, chunk=chunk, compress_once=compress_once)
        finally:
            hashed.result()  # damage explains whatever else went wrong
    return session


def _verify_weights(bundle: Bundle, chosen: Provider) -> None:
    if chosen.engine is not None:
        chosen.engine.verify()
    if chosen.engine is None or not chosen.engine.has_weights:
        bundle.verify([DATA_FILE])
