"""A session: an open bundle that takes prompts and returns logits, tokens or text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast, overload

from numpy.typing import ArrayLike

from kvexport.bundle import Bundle
from kvexport.bundle.graph_io import CHUNK
from kvexport.bundle.text_file import read_text_file
from kvexport.errors import UsageError
from kvexport.runtime.backends.select import Provider, choose, open_decoder
from kvexport.runtime.cache.sequences import Cache
from kvexport.runtime.cache.usage import Memory, memory_of
from kvexport.runtime.core import SessionCore, require_positive
from kvexport.runtime.generation import Generation, Stop, Stream, TokenLoop, generate
from kvexport.runtime.lease import SequenceLease
from kvexport.runtime.prompt_runner import Active, require_batch
from kvexport.runtime.prompts import Prompt, PromptEncoder, batched, is_ids
from kvexport.runtime.sampling import Sampling
from kvexport.runtime.tokenizer import tokenizer_of
from kvexport.runtime.types import Ids, Logits

Stops = str | Sequence[int | str]


class Session:
    """A bundle loaded for inference, with its own cache for one batch of sequences.

    Calls without `cache=` start from empty sequences in the session's own cache; `step` continues them. Calls
    with `cache=` continue the sequences of that cache (`new_cache`, `load`).

    Thread-safe: calls from several threads run one after another. A stream holds the session only while it
    computes its next piece.

    Use it in a `with` statement, or call `close`; afterwards every call raises UsageError.

    Attributes:
        bundle: the opened bundle.
        provider: what runs it: "cpu" or "cuda" (ONNX Runtime), or "tensorrt".
        engine: name and version of that library, such as "onnxruntime 1.31.1".
        capacity: the largest number of tokens of a sequence: the bundle's, or its engine's.
        core: internal state; not part of the public API.
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
        """Load the graph or the engine, without verifying the bundle's hashes (`kvexport.open` does).

        Args:
            bundle: the bundle, opened with `Bundle.open`.
            provider: "cpu", "cuda" or "tensorrt". "auto": tensorrt if the bundle has an engine that runs on
                this machine, else cuda if ONNX Runtime supports it and there is a GPU, else cpu. Or the
                result of `kvexport.runtime.backends.select.choose`.
            threads: CPU threads per operator; None: one per core.
            chunk: the largest number of prompt tokens per call; engines and eviction may lower it. Layers
                with a sliding window hold the window and so many tokens.
            compress_once: run a whole prompt without eviction and evict down to the budget afterwards, all at
                once, as arXiv 2406.11430 measures it. For comparison: the buffers are as large as the prompt.

        Raises:
            CannotRunHere: this machine lacks what the provider needs, or kernels for the bundle's dtype.
            BundleError: the graph, the engine or the tokenizer contradicts the manifest.
            UsageError: an argument is out of range, or `compress_once` cannot be used.
        """
        require_positive("chunk", chunk)
        if compress_once and bundle.eviction is None:
            raise UsageError(
                f"the bundle {bundle.path} must have a KV budget to be used with compress_once",
                fix="build it with a budget: kvexport build --kv-budget TOKENS",
            )
        chosen = choose(bundle, provider) if isinstance(provider, str) else provider
        if compress_once and chosen.name == "tensorrt":
            raise UsageError(
                "the provider must be cpu or cuda with compress_once: "
                "the cache of a TensorRT engine has the size of the budget and cannot hold a whole prompt",
                got="tensorrt",
                fix="leave compress_once out, or use --provider cuda or cpu",
            )
        self.bundle, self.provider = bundle, chosen.name
        text = read_text_file(bundle)
        tokenizer = tokenizer_of(bundle, text)  # first: reading it takes more memory than keeping it
        decoder = open_decoder(bundle, chosen, threads=threads, chunk=chunk)
        self.core = SessionCore(bundle, decoder, chunk, compress_once=compress_once)
        self.engine, self.capacity = chosen.version, self.core.capacity
        self._prompts = PromptEncoder(bundle, self.core, text, tokenizer)

    def __enter__(self) -> Session:
        with self.core.lock:
            return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the weights and all caches; waits for a running call. A second call does nothing."""
        self.core.close()

    @property
    def lengths(self) -> Ids:
        """Tokens of each sequence in the session's own cache, evicted ones included, int64 [B]."""
        with self.core.lock:
            return self.core.own.lengths

    def reset(self, batch: int = 1) -> None:
        """Empty the session's own cache and release its memory.

        Args:
            batch: number of sequences from now on.

        Raises:
            UsageError: `batch` is below 1, or the engine runs another number of sequences.
        """
        require_positive("batch", batch)
        with self.core.lock:
            self.core.restart(batch)

    def new_cache(self, batch: int = 1) -> Cache:
        """Create an empty cache beside the session's own: another conversation over the same weights.

        With ONNX Runtime its memory grows with the sequences; with TensorRT it is allocated at once.

        Args:
            batch: number of sequences.

        Raises:
            UsageError: `batch` is below 1, the engine runs another number of sequences, or the session was
                opened with compress_once.
            CannotRunHere: there is not enough memory.
        """
        require_positive("batch", batch)
        with self.core.lock:
            return self.core.new_cache(batch)

    def load(self, path: Path | str) -> Cache:
        """Load a cache that `Cache.save` wrote for this bundle.

        The whole file is checked before memory is allocated.

        Args:
            path: the file.

        Raises:
            UsageError: there is no such file, it is damaged or belongs to another bundle, or its sequences do
                not fit.
            CannotRunHere: there is not enough memory.
        """
        with self.core.lock:
            return self.core.load(Path(path))

    def prefill(
        self,
        prompts: str | list[str] | Sequence[Sequence[int]] | Sequence[int],
        *,
        cache: Cache | None = None,
    ) -> Logits:
        """Run prompts and return the logits after the last token of each.

        Args:
            prompts: one prompt or a list of prompts of any lengths; each is text or token ids.
            cache: continue its sequences, one prompt per sequence; a prompt may be empty there. None: start
                from empty sequences in the session's own cache.

        Returns:
            Logits, float32 [B, vocab].

        Raises:
            UsageError: a prompt is empty where its sequence is, a token id is outside the vocabulary, a
                prompt does not fit the capacity, a prompt is text and the bundle has no tokenizer, the number
                of prompts differs from the cache's number of sequences, or the cache belongs to another
                session.
        """
        with self.core.lock:
            batch = batched(prompts) if cache is None or len(prompts) else [prompts]
            rows = [self._prompts.ids(prompt, cache, row) for row, prompt in enumerate(batch)]
            return self.core.prefill(rows, cache)

    def step(
        self, token_ids: ArrayLike, active: Active | None = None, *, cache: Cache | None = None
    ) -> Logits:
        """Run one more token of every sequence and return the logits after it.

        Args:
            token_ids: one token per sequence, integers [B].
            active: which sequences take their token, bool [B]; None: all. The others stay as they are: their
                last token is run again in its place. With `compress_once` it may be evicted already; their
                logits are zeros then.
            cache: continue its sequences. None: those of the session's own cache.

        Returns:
            Logits, float32 [B, vocab].

        Raises:
            UsageError: a token id is outside the vocabulary, the number of tokens differs from the number of
                sequences, a sequence is full, or the cache belongs to another session.
        """
        with self.core.lock:
            sequences = self.core.sequences(cache)
            if cache is None and any(sequences.pending):
                sequences.pending = [[] for _ in sequences.pending]
            return self.core.runner.step(sequences, token_ids, active)

    def score(self, token_ids: ArrayLike) -> Logits:
        """Run token sequences from the start and return the logits after every token (teacher forcing).

        Uses the session's own cache.

        Args:
            token_ids: integers [B, S], with B and S at least 1.

        Returns:
            Logits, float32 [B, S, vocab].

        Raises:
            UsageError: there is no token, a token id is outside the vocabulary, or S is larger than the
                capacity.
        """
        with self.core.lock:
            ids = self.core.runner.checked(token_ids, dimensions=2)
            if ids.size == 0:
                raise UsageError("token_ids must not be empty", got=f"shape {ids.shape}")
            self.core.own.kv.require_room(ids.shape[1], "the tokens must fit the capacity")
            return self.core.runner.score(self.core.restart(len(ids), ids.shape[1]), ids)

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
        """Generate tokens after a prompt, or after each of several prompts at once.

        Args:
            prompt: one prompt or a list of prompts; each is text or token ids.
            max_new_tokens: the largest number of new tokens per prompt, at least 1.
            temperature: 0: the most likely token (greedy). Above 0: logits are divided by it and a token is
                drawn. None: 1 if `top_k` or `top_p` is given, else 0.
            top_k: draw from the K most likely tokens only.
            top_p: draw from the smallest set of most likely tokens whose probability reaches this value, in
                (0, 1].
            seed: makes drawing repeatable; a prompt draws the same tokens with any other prompts after
                it in the batch.
            stop: token ids and texts that end a sequence; they are not part of the result. Token ids replace
                the model's own end-of-sequence tokens; with texts alone, or None, those stay. An empty list:
                no stop.
            cache: continue its sequences, one prompt per sequence; a prompt may be empty there. The last
                token that was generated is pending: the next call runs it first. None: start from empty
                sequences in the session's own cache.

        Returns:
            One Generation for one prompt, a list for several.

        Raises:
            UsageError: as `prefill`; an argument is out of range; or text is needed and the bundle has no
                tokenizer.
            BundleError: a logit is not finite.
        """
        if not isinstance(prompt, Iterable):
            raise UsageError("a prompt must be text, token ids, or a list of either", got=repr(prompt)[:80])
        single = isinstance(prompt, str) or is_ids(prompt)
        options = max_new_tokens, Sampling.of(temperature, top_k, top_p, seed), stop, cache
        with self.core.lock:
            results = generate(self._loop(cast("list[Prompt]", [prompt] if single else prompt), *options))
        return results[0] if single else results

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
        """Generate after one prompt and yield the text piece by piece; arguments as `generate`.

        The prompt is run when the first piece is requested. A stream that is left early leaves its sequence
        valid: a later call with the same `cache` continues it.

        Raises:
            UsageError: as `generate`; the bundle has no tokenizer; or, from the iterator, another call has
                changed the sequences in the meantime.
        """
        self._prompts.require_tokenizer()
        with self.core.lock:
            return Stream(
                self._loop(
                    [prompt], max_new_tokens, Sampling.of(temperature, top_k, top_p, seed), stop, cache
                )
            )

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: any valid Unicode.
            special: add the tokenizer's special tokens, as for the first text of a sequence.

        Raises:
            UsageError: the bundle has no tokenizer, or the text has an unpaired surrogate.
        """
        with self.core.lock:
            return self._prompts.require_tokenizer().encode(text, special=special)

    def turn(self, text: str, *, system: str | None = None, cache: Cache | None = None) -> str:
        """Format a user message with the bundle's chat template; without one, return the text itself.

        Args:
            text: the user's message.
            system: a system prompt, allowed in the first message only.
            cache: the conversation, which starts if the cache is empty. None: it starts.

        Returns:
            The prompt for `generate`, `stream` or `prefill`: from the end of the last message to the start of
            the answer.

        Raises:
            UsageError: `system` is given and there is no template, the template has no system prompt, or the
                conversation has already started.
        """
        with self.core.lock:
            starts = cache is None or self.core.sequences(cache).is_empty(0)
        return self._prompts.turn(text, system, starts=starts)

    def memory(self, cache: Cache | None = None) -> Memory:
        """Sizes of a cache in bytes and tokens, and the memory of the device.

        Args:
            cache: None: the session's own.

        Raises:
            UsageError: the cache belongs to another session.
        """
        with self.core.lock:
            sequences = self.core.sequences(cache)
            return memory_of(sequences.kv, self.bundle, self.core.decoder.device_memory())

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
            self._prompts.require_tokenizer()
        if cache is not None:
            require_batch(self.core.sequences(cache), len(prompts))
        ids = [self._prompts.ids(prompt, cache, row).tolist() for row, prompt in enumerate(prompts)]
        lease = SequenceLease(self.core, cache)
        return TokenLoop(lease, ids, max_new_tokens, ends, sampling, self._prompts.tokenizer)
