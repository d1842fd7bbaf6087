"""A bundle that generates: prompts in, logits, tokens or text out; anew, or going on with a cache.

Knows prompts, threads, and whose turn it is; what runs the model is chosen in `providers`, tokens are fed in `feeding`, the
loop from token to token is in `generation`, and what is kept of sequences in `sequences`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast, overload

import numpy as np
from numpy.typing import ArrayLike

from kvexport.bundle.bundle import Bundle
from kvexport.bundle.engine_record import manifest_digest
from kvexport.bundle.text_file import read_text_file
from kvexport.errors import CannotRunHere, UsageError
from kvexport.runtime.backends.select import Provider, choose, open_decoder
from kvexport.runtime.cache import saved_cache as saved
from kvexport.runtime.cache.sequences import Cache, Sequences, SessionLock
from kvexport.runtime.cache.usage import Memory, memory_of
from kvexport.runtime.feeder import Active, PromptRunner, require_batch
from kvexport.runtime.generation import Generation, Stop, Stream, TokenLoop, generate
from kvexport.runtime.lease import SequenceLease
from kvexport.runtime.sampling import Sampling
from kvexport.runtime.tokenizer import Tokenizer, Turn, tokenizer_of
from kvexport.runtime.types import Ids, Logits

Prompt = str | Sequence[int]
Stops = str | Sequence[int | str]
CHUNK = 128  # tokens of a prompt in one call: as fast as more, and the scores of its attention take half of what 256 take


class Session:
    """A bundle that runs, with a cache of its own for one batch of sequences, and as many others as `new_cache` makes.

    Without `cache=` a call starts anew in the session's own cache (`step` goes on there); with it, it goes on where that cache
    is. Calls from several threads take turns; a stream takes one for each of its pieces.

    Use it in a `with` statement, or close it: after that every call says that it is closed.

    Attributes:
        bundle: the opened bundle.
        provider: what runs it: "cpu" or "cuda" (ONNX Runtime's), or "tensorrt".
        engine: that library and its version.
        capacity: the most tokens that a sequence may ever have: the bundle's, or its engine's.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        provider: str | Provider = "auto",
        threads: int | None = None,
        chunk: int = CHUNK,
        compress_once: bool = False,
    ) -> None:
        """Load the graph or the engine; hashes nothing (see `kvexport.open`).

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
            raise UsageError("chunk is out of range", got=chunk, expected="1 or more")
        if compress_once and bundle.eviction is None:
            raise UsageError(
                f"the bundle {bundle.path} has no budget to bring a prompt within",
                fix="build it with one: kvexport build --kv-budget TOKENS",
            )
        chosen = choose(bundle, provider) if isinstance(provider, str) else provider
        if compress_once and chosen.name == "tensorrt":
            raise UsageError(
                "an engine's cache has the size of the budget from the start, and cannot hold a longer prompt whole",
                got="compress_once",
                fix="leave it out, or run without the engine: --provider cuda or cpu",
            )
        self.bundle, self.provider, self._compress_once = bundle, chosen.name, compress_once
        self._guard, self._caches = SessionLock(), weakref.WeakSet[Cache]()
        self._digest = manifest_digest(bundle.path)
        self._decoder = open_decoder(bundle, chosen, threads=threads)
        self._feeder = PromptRunner(bundle, self._decoder, chunk, compress_once=compress_once)
        self.engine, self.capacity = chosen.version, self._decoder.cache.limit
        text = read_text_file(bundle)
        self._tokenizer = tokenizer_of(bundle, text)
        self._chat = None if text is None else text.chat
        self._own = Sequences.empty(self._decoder.cache)

    def __enter__(self) -> Session:
        with self._guard:
            return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back the weights and every cache, after the call that is going on; closing again does nothing."""
        with self._guard.lock:
            if self._guard.closed:
                return
            self._guard.closed = True
            for cache in self._caches:
                cache.sequences.kv.release()
            self._own.kv.release()
            del self._decoder, self._feeder

    @property
    def lengths(self) -> Ids:
        """Tokens that each sequence of the session's own cache had [B], those that were evicted among them."""
        with self._guard:
            return self._own.lengths

    def reset(self, batch: int = 1) -> None:
        """Give the session's own cache back, and begin there with `batch` empty sequences."""
        _require_batch(batch)
        with self._guard:
            self._begin(batch)

    def new_cache(self, batch: int = 1) -> Cache:
        """An empty cache for `batch` sequences over the same weights: another conversation.

        On ONNX Runtime its memory grows with the sequences; with an engine it is allocated at once.

        Raises:
            UsageError: the batch is below 1, an engine is for another number of sequences, or the session compresses once.
            CannotRunHere: not enough memory.
        """
        _require_batch(batch)
        with self._guard:
            self._require_going_on()
            try:
                return self._cache_of(Sequences.empty(self._own.kv.another(batch)))
            except MemoryError as error:
                raise CannotRunHere("there is not enough memory for so many sequences", got=batch) from error

    def load(self, path: Path | str) -> Cache:
        """The cache that `Cache.save` wrote, of this very bundle; everything is checked before memory is taken.

        Raises:
            UsageError: no such file, one that is damaged or of another bundle, or sequences that do not fit the engine.
            CannotRunHere: not enough memory.
        """
        with self._guard:
            self._require_going_on()
            kv, state = saved.read(Path(path), self._digest, self.bundle.model.vocab_size, self._own.kv)
            return self._cache_of(Sequences(kv, state.lengths, state.last, state.pending))

    def prefill(
        self,
        prompts: str | list[str] | Sequence[Sequence[int]] | Sequence[int],
        *,
        cache: Cache | None = None,
    ) -> Logits:
        """Feed prompts of any lengths, token ids or text; returns the logits [B, vocab] after each one's last token.

        Args:
            cache: go on with its sequences, one prompt for each, which may be empty. None: start anew.

        Raises:
            UsageError: an empty prompt where a sequence begins, a token id outside the vocabulary, a prompt longer than the
                capacity, text where the bundle has no tokenizer, or another number of prompts than the cache has sequences.
        """
        with self._guard:
            held = None if cache is None else self._sequences(cache)
            given = _batched(prompts) if cache is None or len(prompts) else [prompts]
            rows = [
                self._feeder.checked(self._encode(prompt, cache, row)) for row, prompt in enumerate(given)
            ]
            counts = self._feeder.counted(held, rows)
            return self._feeder.prefill(held or self._begin(len(rows), int(counts.max())), rows, counts)

    def step(
        self, token_ids: ArrayLike, active: Active | None = None, *, cache: Cache | None = None
    ) -> Logits:
        """One more token [B] for every sequence; returns the logits [B, vocab] after it.

        Sequences that are not `active` [B] stay as they are: whatever their token here, their last one is run again
        in its place. With `compress_once` it may be gone: they are left out, and their logits are zeros.

        Args:
            cache: whose sequences; None: the session's own, as `prefill` or `step` left them.

        Raises:
            UsageError: a token id outside the vocabulary, another number of tokens than sequences, or a full cache.
        """
        with self._guard:
            held = self._sequences(cache)
            if cache is None and any(held.pending):
                held.pending = [[] for _ in held.pending]
            return self._feeder.step(held, token_ids, active)

    def score(self, token_ids: ArrayLike) -> Logits:
        """Logits [B, S, vocab] after every one of these tokens [B, S], teacher-forced, in the session's own cache from its
        beginning.

        Raises:
            UsageError: no token, a token id outside the vocabulary, or more tokens than the capacity.
        """
        with self._guard:
            ids = self._feeder.checked(token_ids, dimensions=2)
            if ids.size == 0:
                raise UsageError("there is no token to score", got=f"shape {ids.shape}")
            self._own.kv.require_room(ids.shape[1], "the tokens exceed the bundle's capacity")
            return self._feeder.score(self._begin(len(ids), ids.shape[1]), ids)

    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = ...,
        temperature: float | None = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        seed: int | None = ...,
        stop: Stops | None = ...,
        cache: Cache | None = ...,
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompt: list[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = ...,
        temperature: float | None = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        seed: int | None = ...,
        stop: Stops | None = ...,
        cache: Cache | None = ...,
    ) -> list[Generation]: ...
    def generate(
        self,
        prompt: Prompt | list[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 128,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Stops | None = None,
        cache: Cache | None = None,
    ) -> Generation | list[Generation]:
        """Generate after a prompt, text or token ids; or after each of several, all at once.

        Args:
            max_new_tokens: the most tokens to generate for each prompt.
            temperature: 0 takes the likeliest token; above it tokens are drawn, the likeliest less often the higher it is.
                None: 1 where top_k or top_p is given, else 0.
            top_k, top_p: draw from the K likeliest tokens, and of those from the likeliest that reach this probability.
            seed: makes draws repeatable; a prompt draws the same whatever is behind it in a batch.
            stop: token ids, in place of the model's own, and texts that end a sequence; neither is part of what is said. None,
                or texts alone: the model's own tokens do; an empty list: none does.
            cache: go on with its sequences, one prompt for each, which may be empty. The last token that was chosen is not
                fed; the next call feeds it first. None: start anew.

        Raises:
            UsageError: as `prefill`, a value out of range, or text where the bundle has no tokenizer.
            BundleError: the model's logits are not finite.
        """
        if not isinstance(prompt, Iterable):
            raise UsageError(
                "a prompt is neither text nor token ids",
                got=repr(prompt)[:80],
                expected="text, token ids, or a list",
            )
        single = isinstance(prompt, str) or _is_ids(prompt)
        options = max_new_tokens, _sampling(temperature, top_k, top_p, seed), stop, cache
        with self._guard:
            made = generate(self._loop(cast("list[Prompt]", [prompt] if single else prompt), *options))
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
        stop: Stops | None = None,
        cache: Cache | None = None,
    ) -> Stream:
        """The text of `generate`, with its arguments, piece by piece as it is made; one that is left early can be gone on with.

        Raises:
            UsageError: as `generate`, the bundle has no tokenizer, or another call has used its sequences in the meantime.
        """
        self._require_tokenizer()
        with self._guard:
            return Stream(
                self._loop([prompt], max_new_tokens, _sampling(temperature, top_k, top_p, seed), stop, cache)
            )

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            special: with the special tokens that the tokenizer puts around a text, as the first one in a cache has them.

        Raises:
            UsageError: the bundle has no tokenizer, or the text is none.
        """
        with self._guard:
            return self._require_tokenizer().encode(text, special=special)

    def turn(self, text: str, *, system: str | None = None, cache: Cache | None = None) -> str:
        """What to feed for a user's turn, by the bundle's chat template; without one, the text itself.

        Args:
            system: what comes before the first turn.
            cache: the conversation: it begins where that is empty. None: it begins.

        Raises:
            UsageError: a system text where there is no template, where it takes none, or where the conversation goes on.
        """
        with self._guard:
            begins = cache is None or self._sequences(cache).begins(0)
        if self._chat is not None:
            return Turn(self._chat.turn(text, system, begins))
        if system is not None:
            raise UsageError(
                f"the bundle {self.bundle.path} has no chat template, so that there is no place for a system text",
                got=system[:80],
                fix="put it at the beginning of the first text",
            )
        return text

    def memory(self, cache: Cache | None = None) -> Memory:
        """What a cache takes, and may take (None: the session's own); an engine's has its whole capacity from the start."""
        with self._guard:
            return memory_of(self._sequences(cache).kv, self.bundle, self._decoder.device_memory())

    def _begin(self, batch: int, tokens: int = 0) -> Sequences:
        """The session's own cache, empty, which with `compress_once` holds so many tokens of a sequence before any goes."""
        slots = None
        if self._compress_once:
            assert self.bundle.eviction is not None
            slots = max(tokens, self.bundle.eviction.budget)
        kv = self._own.kv.fresh(batch, slots)
        self._decoder.use(kv)
        self._own = Sequences.empty(kv)
        return self._own

    def _cache_of(self, sequences: Sequences) -> Cache:
        cache = Cache(self._guard, sequences, self._digest)
        self._caches.add(cache)
        return cache

    def _sequences(self, cache: Cache | None) -> Sequences:
        """Of a cache, or the session's own.

        Raises:
            UsageError: the cache is another session's.
        """
        if cache is None:
            return self._own
        if cache not in self._caches:
            raise UsageError("the cache is another session's", fix="make one here: session.new_cache()")
        return cache.sequences

    def _require_going_on(self) -> None:
        if self._compress_once:
            raise UsageError(
                "a session that compresses a prompt once cannot go on with another cache",
                got="compress_once",
                fix="leave compress_once out",
            )

    def _loop(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        sampling: Sampling,
        stop: Stops | None,
        cache: Cache | None,
    ) -> TokenLoop:
        ends = Stop.of(stop, self.bundle.model.eos_token_ids, self.bundle.model.vocab_size)
        if ends.texts:
            self._require_tokenizer()
        if cache is not None:
            require_batch(self._sequences(cache), len(prompts))
        ids = [
            self._feeder.checked(self._encode(prompt, cache, row)).tolist()
            for row, prompt in enumerate(prompts)
        ]
        return TokenLoop(SequenceLease(self, cache), ids, max_new_tokens, ends, sampling, self._tokenizer)

    def _require_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise UsageError(
                f"the bundle {self.bundle.path} has no tokenizer, so it takes and gives token ids only",
                fix="call generate with token ids, or add tokenizer.json to the checkpoint and build again",
            )
        return self._tokenizer

    def _encode(self, prompt: Prompt, cache: Cache | None = None, row: int = 0) -> Sequence[int]:
        """Token ids of a prompt for a sequence of a cache, or of one that begins."""
        if not isinstance(prompt, str):
            return prompt
        tokenizer, held = self._require_tokenizer(), None if cache is None else self._sequences(cache)
        if held is not None and row < held.kv.batch and not held.begins(row):
            return tokenizer.encode(prompt, special=False)
        bos = self.bundle.model.bos_token_id
        return tokenizer.encode(prompt, special=not isinstance(prompt, Turn)) or (
            [] if bos is None else [bos]
        )


def _require_batch(batch: int) -> None:
    if batch < 1:
        raise UsageError("the batch is empty", got=batch, expected="1 sequence or more")


def _sampling(
    temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None
) -> Sampling:
    if temperature is None:
        temperature = 0.0 if top_k is None and top_p is None else 1.0
    return Sampling(temperature, top_k, top_p, seed)


def _is_ids(prompt: object) -> bool:
    return isinstance(prompt, Iterable) and all(isinstance(each, (int, np.integer)) for each in prompt)


def _batched(prompts: Sequence[Any]) -> Sequence[Any]:
    if len(prompts) == 0:
        raise UsageError("there is no prompt", fix="give at least one token")
    return [prompts] if isinstance(prompts, str) or _is_ids(prompts) else prompts
