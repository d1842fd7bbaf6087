"""Several caches over one set of weights: each is independent of the others, on every engine."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.simulated_device import SimulatedDevice, add_engine, only_gpu
from support.tiny_bundles import byte_level_tokenizer, write_bundle
from test_runtime_evicting import BUDGET, CAPACITY, CLOSE, Reference, random_decoder, tokens

import kvexport
from kvexport.bundle import Bundle
from kvexport.errors import CannotRunHere, UsageError
from kvexport.eviction.config import Eviction
from kvexport.model.decoder import Decoder
from kvexport.runtime import Cache, Session, open_bundle
from kvexport.runtime.backends import tensorrt as runtime
from kvexport.runtime.backends.ort import OrtDecoder
from kvexport.runtime.cache.kv_cache import KvCache

BATCHED = ("cpu", "cuda")  # runs several sequences at a time
ENGINES = ("std24", "decomposed17")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimulatedDevice:
    monkeypatch.setattr("kvexport.runtime.backends.select._DEVICE_STEP", 16)
    return only_gpu(monkeypatch)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return random_decoder("gqa")


@pytest.fixture(scope="module")
def bundles(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`bundles(kind, eviction=None, dtype="float32")`: read-only; has an engine if kind is a lowering."""
    made: dict[Any, Path] = {}

    def bundle(kind: str, eviction: Eviction | None = None, dtype: str = "float32") -> Path:
        key = (kind, eviction, dtype)
        if key not in made:
            folder = tmp_path_factory.mktemp("caches") / "b"
            made[key] = write_bundle(folder, decoder, capacity=CAPACITY, eviction=eviction, dtype=dtype)
            if kind in ENGINES:
                add_engine(made[key], lowering=kind)
        return made[key]

    return bundle


Opened = Callable[..., Session]


@pytest.fixture
def opened(bundles: Callable[..., Path], device: SimulatedDevice) -> Opened:
    def session(
        kind: str, eviction: Eviction | None = None, dtype: str = "float32", **options: Any
    ) -> Session:
        provider = "tensorrt" if kind in ENGINES else kind
        return Session(Bundle.open(bundles(kind, eviction, dtype)), provider=provider, threads=1, **options)

    return session


EVICTIONS = {"whole": None, "evicting": BUDGET}
everywhere = pytest.mark.parametrize("kind", [*BATCHED, *ENGINES])
batched = pytest.mark.parametrize("kind", BATCHED)
whatever_is_held = pytest.mark.parametrize("eviction", EVICTIONS.values(), ids=EVICTIONS.keys())

Pieces = Sequence[Sequence[int]]


def fed(session: Session, cache: Cache, pieces: Pieces) -> NDArray[np.float32]:
    """The logits after each piece: a step for one token, a prefill for several."""
    return np.array(
        [
            session.step(each, cache=cache)[0] if len(each) == 1 else session.prefill(each, cache=cache)[0]
            for each in pieces
        ]
    )


def expected(
    decoder: Decoder, eviction: Eviction | None, pieces: Pieces, chunk: int | None = None
) -> NDArray[np.float32]:
    """The same from the reference, which runs each piece in the runtime's chunks."""
    reference_model = Reference(decoder, eviction, chunk=chunk)
    return np.array([reference_model.read(each)[-1] for each in pieces])


PIECES = [tokens(n, seed=n) for n in (11, 1, 7, 1, 1, 30, 1, 2, 1)]


@everywhere
@whatever_is_held
def test_prompts_in_pieces_equal_the_reference(
    kind: str, eviction: Eviction | None, opened: Opened, decoder: Decoder
) -> None:
    session = opened(kind, eviction)
    cache = session.new_cache()
    np.testing.assert_allclose(fed(session, cache, PIECES), expected(decoder, eviction, PIECES), **CLOSE)
    assert cache.lengths.tolist() == [sum(map(len, PIECES))]
    cache.clear()
    assert cache.lengths.tolist() == [0]
    np.testing.assert_allclose(
        fed(session, cache, PIECES[2:]), expected(decoder, eviction, PIECES[2:]), **CLOSE
    )


@everywhere
@whatever_is_held
def test_interleaved_conversations_do_not_affect_each_other(
    kind: str, eviction: Eviction | None, opened: Opened, decoder: Decoder
) -> None:
    """Three caches and the session's own, one piece of each in turn."""
    session = opened(kind, eviction)
    pieces = [[tokens(n, seed=10 * row + n) for n in (9, 1, 1, 20, 1, 1, 1)] for row in range(3)]
    caches = [session.new_cache() for _ in pieces]
    own = tokens(14, seed=99)
    actual: list[list[NDArray[np.float32]]] = [[] for _ in pieces]
    session.prefill(own[:8])
    for turn in range(len(pieces[0])):
        for row, cache in enumerate(caches):
            actual[row].append(fed(session, cache, [pieces[row][turn]])[0])
        if turn < 6:
            stepped = session.step([own[8 + turn]])
    for row, each in enumerate(pieces):
        np.testing.assert_allclose(actual[row], expected(decoder, eviction, each), **CLOSE)
    np.testing.assert_allclose(
        stepped[0], expected(decoder, eviction, [own[:8], *([token] for token in own[8:])])[-1], **CLOSE
    )
    assert session.lengths.tolist() == [14]


@pytest.mark.slow
@batched
@whatever_is_held
@pytest.mark.parametrize("chunk", [128, 4, 1])
def test_continues_rows_of_different_lengths(
    kind: str, eviction: Eviction | None, chunk: int, opened: Opened, decoder: Decoder
) -> None:
    session = opened(kind, eviction, chunk=chunk)
    rows = [
        [tokens(n, seed=100 * row + n) for n in lengths]
        for row, lengths in enumerate(((3, 40, 1), (60, 1, 6), (17, 9, 30)))
    ]
    cache = session.new_cache(batch=3)
    actual = [session.prefill([row[piece] for row in rows], cache=cache) for piece in range(3)]
    stepped = session.step([1, 2, 3], cache=cache)
    for row, pieces in enumerate(rows):
        read = chunk if eviction is None else min(chunk, eviction.chunk)
        reference_model = expected(decoder, eviction, [*pieces, [row + 1]], chunk=read)
        np.testing.assert_allclose([each[row] for each in (*actual, stepped)], reference_model, **CLOSE)
    assert cache.lengths.tolist() == [45, 68, 57] and cache.batch == 3


@batched
@pytest.mark.parametrize("lowered", [True, False])
def test_padding_does_not_exceed_the_capacity(
    kind: str, lowered: bool, opened: Opened, decoder: Decoder
) -> None:
    """A nearly full row beside one with a long prompt, on graphs with and without batching of rows."""
    session = opened(kind)
    assert isinstance(session.core.decoder, OrtDecoder)
    session.core.decoder.row_by_row = lowered
    cache, long, short = session.new_cache(batch=2), tokens(90, seed=1), tokens(4, seed=2)
    for row, first in enumerate((long, short)):  # one by one, which every graph can
        for token in first:
            session.step([token, token], np.arange(2) == row, cache=cache)
    more = [tokens(5, seed=3), tokens(50, seed=4)]
    actual = session.prefill(more, cache=cache)
    for row, first in enumerate((long, short)):
        np.testing.assert_allclose(actual[row], expected(decoder, None, [first, more[row]])[-1], **CLOSE)


@batched
def test_cache_memory_follows_the_longest_row(kind: str, opened: Opened) -> None:
    session = opened(kind)
    cache = session.new_cache(batch=2)
    session.prefill([tokens(10), tokens(1)], cache=cache)
    session.prefill([tokens(1), tokens(40)], cache=cache)
    assert session.memory(cache).capacity == (48 if kind == "cuda" else CAPACITY)
    assert cache.bytes == session.memory(cache).bytes_allocated == sum(session.memory(cache).layers)


# Continuing after a generation.


@everywhere
@whatever_is_held
def test_generating_in_two_calls_equals_one_call(
    kind: str, eviction: Eviction | None, opened: Opened
) -> None:
    session, prompt = opened(kind, eviction), tokens(20)
    at_once = session.generate(prompt, max_new_tokens=24, stop=[])
    cache = session.new_cache()
    first = session.generate(prompt, max_new_tokens=9, stop=[], cache=cache)
    assert cache.lengths.tolist() == [28] and session.memory(cache).batch == 1  # the ninth is not fed
    rest = session.generate([], max_new_tokens=15, stop=[], cache=cache)
    assert first.token_ids + rest.token_ids == at_once.token_ids
    assert (first.prompt_tokens, rest.prompt_tokens) == (20, 0)
    stepped = session.step([5], cache=cache)  # after what is pending
    other = session.new_cache()
    np.testing.assert_allclose(
        session.prefill([*prompt, *at_once.token_ids, 5], cache=other),
        stepped,
        atol=1e-5 if eviction is None else 9,
    )
    assert cache.lengths.tolist() == other.lengths.tolist() == [45]


@batched
def test_continues_batches_whose_rows_ended_at_different_lengths(kind: str, opened: Opened) -> None:
    session = opened(kind)
    prompts = [tokens(20, seed=1), tokens(6, seed=2), tokens(13, seed=3)]
    free = session.generate(prompts, max_new_tokens=12, stop=[])
    end = free[1].token_ids[5]
    cache = session.new_cache(batch=3)
    first = session.generate(prompts, max_new_tokens=12, stop=[end], cache=cache)
    assert first[1].finish_reason == "stop"
    more = [[7], [8, 9, 1], []]
    rest = session.generate(more, max_new_tokens=6, stop=[], cache=cache)
    for row, prompt in enumerate(prompts):
        alone = session.generate([*prompt, *first[row].token_ids, *more[row]], max_new_tokens=6, stop=[])
        assert alone.token_ids == rest[row].token_ids


@everywhere
def test_empty_prompt_continues_after_the_last_token(kind: str, opened: Opened) -> None:
    session, prompt = opened(kind, BUDGET), tokens(31)
    cache = session.new_cache()
    logits = session.prefill(prompt, cache=cache)
    np.testing.assert_allclose(session.prefill([], cache=cache), logits, **CLOSE)
    made = session.generate([], max_new_tokens=5, stop=[], cache=cache)
    assert made.token_ids == session.generate(
        prompt, max_new_tokens=5, stop=[]
    ).token_ids and cache.lengths.tolist() == [35]
    cache.clear()
    with pytest.raises(UsageError, match="a prompt must not be empty"):
        session.prefill([], cache=cache)


def test_step_without_a_cache_continues_the_sessions_own(opened: Opened) -> None:
    """The pending token of generate is dropped in the session's own cache."""
    session, prompt = opened("cpu"), tokens(9)
    made = session.generate(prompt, max_new_tokens=4, stop=[])
    actual = session.step([3])
    np.testing.assert_allclose(actual, session.prefill([*prompt, *made.token_ids[:-1], 3]), **CLOSE)


def test_inactive_rows_keep_their_pending_token(opened: Opened) -> None:
    session, prompts = opened("cpu"), [tokens(5, seed=1), tokens(8, seed=2)]
    cache = session.new_cache(batch=2)
    made = session.generate(prompts, max_new_tokens=3, stop=[], cache=cache)
    session.step([4, 4], np.array([True, False]), cache=cache)
    assert cache.lengths.tolist() == [9, 10]
    actual = session.step([6, 6], cache=cache)
    for row, more in enumerate(([4, 6], [6])):
        np.testing.assert_allclose(
            actual[row], session.prefill([*prompts[row], *made[row].token_ids, *more])[0], **CLOSE
        )


def test_continues_with_text(tmp_path: Path) -> None:
    decoder = random_decoder("gqa", vocab=320)
    session = open_bundle(
        write_bundle(tmp_path / "b", decoder, capacity=200, tokenizer=byte_level_tokenizer()), threads=1
    )
    whole = session.generate("Once upon a time", max_new_tokens=24, stop=[])
    cache = session.new_cache()
    texts = [session.generate("Once upon a time", max_new_tokens=10, stop=[], cache=cache).text]
    texts.append("".join(session.stream("", max_new_tokens=14, stop=[], cache=cache)))
    if "\ufffd" not in "".join(map(str, texts)):
        assert "".join(map(str, texts)) == whole.text
    assert session.turn("hello", cache=cache) == "hello"  # no chat template
    with pytest.raises(UsageError, match="must have a chat template"):
        session.turn("hello", system="be kind")


def test_adds_special_tokens_at_the_start_only(tmp_path: Path) -> None:
    """Not in the middle of a conversation, and not around text from a chat template."""
    from tokenizers import Tokenizer, processors

    from kvexport.runtime.tokenizer import Turn

    made = Tokenizer.from_str(byte_level_tokenizer())
    made.post_processor = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    decoder = random_decoder("gqa", vocab=320)
    session = open_bundle(
        write_bundle(tmp_path / "b", decoder, capacity=64, tokenizer=made.to_str()), threads=1
    )
    plain = made.encode("abc", add_special_tokens=False).ids
    cache = session.new_cache()
    for text, more in (("abc", 1), ("abc", 0), (Turn("abc"), 0)):
        before = int(cache.lengths[0])
        session.prefill(text, cache=cache)
        assert int(cache.lengths[0]) - before == len(plain) + more
    assert session.generate("abc", max_new_tokens=1).prompt_tokens == len(plain) + 1
    assert session.generate(Turn("abc"), max_new_tokens=1).prompt_tokens == len(plain)
    assert session.prefill(["abc", "abcabc"]).shape == (2, 320)


# Rejected calls, which change nothing.


def test_rejects_calls_that_do_not_fit_the_cache(opened: Opened) -> None:
    session, other = opened("cpu"), opened("cpu")
    cache = session.new_cache(batch=2)
    session.prefill([tokens(90), tokens(4)], cache=cache)
    before = session.step([1, 1], np.array([False, False]), cache=cache)
    for refused, message in (
        (lambda: session.prefill(tokens(3), cache=cache), "one prompt for each sequence"),
        (lambda: session.generate([[1]] * 3, cache=cache), r"session\.new_cache\(batch=3\)"),
        (lambda: session.prefill([tokens(7), [1]], cache=cache), "must fit behind"),
        (lambda: session.step([1], cache=cache), "one token for each"),
        (lambda: other.step([1, 1], cache=cache), "must belong to this session"),
        (lambda: other.memory(cache), "must belong to this session"),
        (lambda: other.stream([1], cache=cache), "must have a tokenizer"),
        (lambda: session.new_cache(batch=0), "batch must be at least 1"),
        (lambda: session.prefill([[1], [99]], cache=cache), "inside the vocabulary"),
    ):
        with pytest.raises(UsageError, match=message):
            refused()
    assert cache.lengths.tolist() == [90, 4]
    np.testing.assert_allclose(session.step([1, 1], np.array([False, False]), cache=cache), before, **CLOSE)


def test_counts_pending_tokens_before_running_any(opened: Opened) -> None:
    session = opened("cpu")
    cache = session.new_cache()
    session.generate(tokens(CAPACITY - 2), max_new_tokens=2, stop=[], cache=cache)  # one of them is pending
    with pytest.raises(UsageError, match=f"{CAPACITY + 2} tokens"):
        session.prefill([1, 2], cache=cache)
    assert cache.lengths.tolist() == [CAPACITY - 1]
    session.prefill([], cache=cache)
    with pytest.raises(UsageError, match="must fit the capacity"):
        session.step([1], cache=cache)


def test_compress_once_rejects_further_caches(opened: Opened, tmp_path: Path) -> None:
    session = opened("cpu", BUDGET, compress_once=True)
    for call in (session.new_cache, lambda: session.load(tmp_path / "x")):
        with pytest.raises(UsageError, match="compress_once"):
            call()


@pytest.mark.parametrize("kind", ENGINES)
def test_engine_rejects_caches_of_another_batch(kind: str, opened: Opened) -> None:
    with pytest.raises(UsageError, match="the number of sequences must be 1"):
        opened(kind).new_cache(batch=2)


@whatever_is_held
def test_cache_is_undefined_after_a_call_failed_midway(
    eviction: Eviction | None, opened: Opened, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = opened("cpu", eviction)
    cache, other = session.new_cache(), session.new_cache()
    session.prefill(tokens(20), cache=cache)
    session.prefill(tokens(20), cache=other)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(OrtDecoder, "call", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.step([1], cache=cache)
    for call in (
        lambda: session.step([1], cache=cache),
        lambda: session.prefill([1], cache=cache),
        lambda: cache.save("x"),
    ):
        with pytest.raises(UsageError, match=r"failed midway[\s\S]*cache\.clear\(\)"):
            call()
    np.testing.assert_allclose(
        session.step([1], cache=other)[0], expected(decoder, eviction, [tokens(20), [1]])[-1], **CLOSE
    )
    cache.clear()
    np.testing.assert_allclose(
        session.prefill(tokens(20), cache=cache)[0], expected(decoder, eviction, [tokens(20)])[0], **CLOSE
    )


def test_failed_growth_keeps_the_cache(opened: Opened, device: SimulatedDevice, decoder: Decoder) -> None:
    session = opened("cuda")
    cache = session.new_cache()
    session.prefill(tokens(16), cache=cache)
    device.total = device.used + 100
    with pytest.raises(CannotRunHere, match="not enough memory"):
        session.step([1], cache=cache)
    device.total = 1 << 30
    np.testing.assert_allclose(
        session.step([1], cache=cache)[0], expected(decoder, None, [tokens(16), [1]])[-1], **CLOSE
    )


# Memory and close.


@everywhere
def test_releases_memory(kind: str, opened: Opened, device: SimulatedDevice) -> None:
    session = opened(kind)
    session.prefill(tokens(5))
    held = device.used
    caches = [session.new_cache() for _ in range(2)]
    for cache in caches:
        session.prefill(tokens(40), cache=cache)
        assert cache.bytes > 0
    assert session.memory(caches[0]).device is None or session.memory(caches[0]).device.kv == caches[0].bytes  # type: ignore[union-attr]
    with_all = device.used
    caches[0].clear()
    if kind not in ENGINES:
        assert caches[0].bytes == 0 and (kind == "cpu" or device.used < with_all)
    del cache, caches
    session.prefill(tokens(5))
    assert device.used <= held
    weights = 4096 if kind in ENGINES else 0
    session.close()
    assert device.used <= weights


@everywhere
def test_every_call_after_close_is_an_error(
    kind: str, opened: Opened, device: SimulatedDevice, tmp_path: Path
) -> None:
    with opened(kind) as session:
        cache = session.new_cache()
        session.prefill(tokens(5), cache=cache)
    calls: dict[str, Callable[[], object]] = {
        "prefill": lambda: session.prefill([1]),
        "step": lambda: session.step([1]),
        "score": lambda: session.score([[1]]),
        "generate": lambda: session.generate([1]),
        "new_cache": session.new_cache,
        "reset": session.reset,
        "memory": session.memory,
        "load": lambda: session.load(tmp_path / "x"),
        "turn": lambda: session.turn("x"),
        "lengths": lambda: session.lengths,
        "save": lambda: cache.save(tmp_path / "x"),
        "clear": cache.clear,
        "cache.lengths": lambda: cache.lengths,
        "cache.bytes": lambda: cache.bytes,
        "with": session.__enter__,
        "going on": lambda: session.step([1], cache=cache),
    }
    for name, call in calls.items():
        with pytest.raises(UsageError, match=r"the session is closed[\s\S]*kvexport\.open"):
            call()
            pytest.fail(name)
    session.close()  # again
    assert device.used <= (4096 if kind in ENGINES else 0)
    assert kvexport.Cache is Cache


def test_has_no_reference_cycles(opened: Opened, device: SimulatedDevice) -> None:
    gc.disable()
    try:
        for kind in ("cuda", "std24"):
            session = opened(kind)
            cache = session.new_cache()
            session.prefill(tokens(20), cache=cache)
            session.step([1], cache=cache)
            before = device.used
            del cache
            assert device.used < before
            del session
            assert device.used <= 4096 * (kind == "std24")
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ENGINES)
def test_each_cache_replays_its_own_cuda_graph(kind: str, opened: Opened, device: SimulatedDevice) -> None:
    session = opened(kind)
    caches = [session.new_cache() for _ in range(2)]
    for cache in caches:
        session.prefill(tokens(9), cache=cache)
        session.step([1], cache=cache)
    allocations = device.allocations
    device.done.clear()
    for cache in caches * 3:
        session.step([2], cache=cache)
    assert device.done.count("launch") == 6 and device.allocations == allocations
    contexts = {cache.sequences.kv.bound.context for cache in caches}
    assert len(contexts) == 2 and len({context.scratch for context in contexts}) == 1


def test_not_enough_device_memory_for_another_cache(opened: Opened, device: SimulatedDevice) -> None:
    session = opened("std24")
    first = session.prefill(tokens(9))
    device.total = device.used + 1000
    with pytest.raises(CannotRunHere, match="not enough memory for the KV cache"):
        session.new_cache()
    device.total = 1 << 30
    cache = session.new_cache()
    device.total = device.used + 10
    with pytest.raises(CannotRunHere, match=r"not enough device memory[\s\S]*fewer caches"):
        session.prefill(tokens(9), cache=cache)
    device.total = 1 << 30
    np.testing.assert_array_equal(session.prefill(tokens(9), cache=cache), first)
    np.testing.assert_array_equal(session.prefill(tokens(9)), first)


def test_continues_float16_caches(opened: Opened, decoder: Decoder) -> None:
    for kind in ("cpu", *ENGINES):
        session = opened(kind, BUDGET, "float16")
        actual = fed(session, session.new_cache(), PIECES[:4])
        assert np.abs(actual - expected(decoder, BUDGET, PIECES[:4])).max() < 0.1


# Injected faults.


def _from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prompt starts at position 0."""
    real = OrtDecoder.run
    monkeypatch.setattr(
        OrtDecoder,
        "run",
        lambda self, ids, positions, *rest, **options: real(
            self, ids, positions - positions[:, :1], *rest, **options
        ),
    )


def _one_cache_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KvCache, "another", lambda self, batch, slots=None: self)


def _binding_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[Any] = []

    def binding(self: OrtDecoder) -> Any:
        if not first:
            first.append(runtime_binding(self))
        return first[0]

    runtime_binding = OrtDecoder.binding_of_cache
    monkeypatch.setattr(OrtDecoder, "binding_of_cache", binding)


def _prompts_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's context for prompts keeps the addresses of the first cache."""
    real, bound = runtime.ContextCalls.bind, set[int]()

    def bind(self: Any, addresses: Any) -> None:
        if id(self) not in bound:
            bound.add(id(self))
            real(self, addresses)

    monkeypatch.setattr(runtime.ContextCalls, "bind", bind)


def _graph_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """All caches share the decode context of the first."""
    real, calls = runtime.TensorRtDecoder.new_calls, list[Any]()

    def made(self: Any, profile: int, cache: KvCache) -> Any:
        if profile == runtime.PREFILL:
            return real(self, profile, cache)
        if not calls:
            calls.append(real(self, profile, cache))
        return calls[0]

    monkeypatch.setattr(runtime.TensorRtDecoder, "new_calls", made)


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("cpu", _from_the_beginning),
        ("cpu", _one_cache_for_all),
        ("cpu", _binding_of_another),
        *((kind, fault) for kind in ENGINES for fault in (_prompts_to_another, _graph_of_another)),
    ],
)
def test_detects_injected_faults(
    kind: str,
    fault: Callable[[pytest.MonkeyPatch], None],
    opened: Opened,
    decoder: Decoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    session = opened(kind)
    one, other = session.new_cache(), session.new_cache()
    parts = [tokens(9, seed=1), [3], [4], tokens(6, seed=2), [5]]
    actual, beside = [], []
    for part in parts:
        actual.append(fed(session, one, [part])[0])
        beside.append(fed(session, other, [[7, *part] if len(part) > 1 else part])[0])
    assert not np.abs(np.array(actual) - expected(decoder, None, parts)).max() < 1e-3
