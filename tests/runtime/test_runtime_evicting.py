"""Layers that evict: the cache equals the reference's for every batch, chunk length and storage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.decoders import make_decoder
from support.tiny_bundles import byte_level_tokenizer, decoder_with_fewer_heads, write_bundle

from kvexport.bundle import Bundle
from kvexport.errors import UsageError
from kvexport.eviction.config import POLICIES, POSITION_PLUS_ONE, SCORE, Eviction
from kvexport.eviction.reference_cache import EvictingCache
from kvexport.model import reference
from kvexport.model.decoder import Decoder
from kvexport.runtime import Session, open_bundle
from kvexport.runtime.backends.ort_session import graph_file
from kvexport.runtime.cache import eviction as runtime
from kvexport.runtime.cache.device_arrays import HOST
from kvexport.runtime.cache.kv_cache import KvCache

CAPACITY, VOCAB = 96, 40
CLOSE = {"rtol": 0.0, "atol": 1e-5}
BUDGET = Eviction("l2-norm", 24, protect_first=2, protect_recent=5)


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()


def random_decoder(style: str, **sizes: Any) -> Decoder:
    return make_decoder(style, dtype=torch.float32, **sizes)


def opened(
    path: Path,
    decoder: Decoder,
    eviction: Eviction,
    capacity: int = CAPACITY,
    lowered: bool = True,
    **options: Any,
) -> Session:
    """A session on a new bundle."""
    bundle = Bundle.open(write_bundle(path, decoder, capacity=capacity, eviction=eviction))
    if not lowered:
        bundle = dataclasses.replace(
            bundle, files={name: each for name, each in bundle.files.items() if "cpu" not in name}
        )
    return Session(bundle, threads=1, provider="cpu", **options)


class Reference:
    """One sequence in the reference's cache, with its prompt in chunks like the runtime's."""

    def __init__(
        self, decoder: Decoder, eviction: Eviction | None, capacity: int = CAPACITY, chunk: int | None = None
    ) -> None:
        self._decoder, self._chunk = decoder, chunk or (eviction.chunk if eviction else capacity)
        self.cache = reference.new_cache(list(decoder.layers), 1, capacity, torch.float32, eviction)
        self.seen = 0

    def read(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits [S, vocab] after each token."""
        parts = [ids[start : start + self._chunk] for start in range(0, len(ids), self._chunk)]
        return np.concatenate([self._call(part) for part in parts])

    def step(self, token: int) -> NDArray[np.float32]:
        return self._call([token])[0]

    def _call(self, ids: Sequence[int]) -> NDArray[np.float32]:
        positions = torch.arange(self.seen, self.seen + len(ids))[None]
        self.seen += len(ids)
        with torch.no_grad():
            logits: NDArray[np.float32] = reference.forward(
                self._decoder, torch.tensor([ids]), positions, self.cache
            )[0].numpy()
        return logits


def differences(session: Session, reference_model: Reference, prompt: int = 60, steps: int = 30) -> float:
    """The largest difference of logits, over a prompt in chunks and steps after it."""
    ids = tokens(prompt + steps)
    expected = [reference_model.read(ids[:prompt])[-1], *map(reference_model.step, ids[prompt:])]
    actual = [session.prefill(ids[:prompt])[0], *(session.step([token])[0] for token in ids[prompt:])]
    return float(np.abs(np.array(actual) - np.array(expected)).max())


CASES: dict[str, Callable[[], Decoder]] = {
    "heads of their own": lambda: random_decoder("llama"),
    "shared heads": lambda: random_decoder("gqa"),
    "alibi": lambda: random_decoder("bloom"),
    "a window": lambda: random_decoder("window", window=9),
    "normed heads": lambda: random_decoder("qwen3", kv_heads=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policy", POLICIES)
def test_prompts_in_chunks_and_steps_equal_the_reference(policy: str, case: str, tmp_path: Path) -> None:
    decoder, eviction = CASES[case](), dataclasses.replace(BUDGET, policy=policy)
    session = opened(tmp_path / "b", decoder, eviction)
    assert differences(session, Reference(decoder, eviction)) < 1e-5
    assert (
        session.lengths.tolist() == [90] and session.memory().bytes_allocated == session.memory().bytes_limit
    )


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("recent", [0, 1, 12])
def test_protected_tokens(first: int, recent: int, tmp_path: Path) -> None:
    decoder, eviction = random_decoder("gqa"), Eviction("l2-norm", 20, first, recent)
    assert differences(opened(tmp_path / "b", decoder, eviction), Reference(decoder, eviction)) < 1e-5


def test_compressed_heads_and_skipped_layers(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("llama", num_key_value_heads=4, vocab_size=VOCAB, num_hidden_layers=3)
    decoder = decoder_with_fewer_heads(checkpoint)
    for skipped in ((), (0,), (1,), (2, 0)):
        eviction = dataclasses.replace(BUDGET, skip_layers=skipped)
        session = opened(tmp_path / f"b{skipped}", decoder, eviction)
        assert differences(session, Reference(decoder, eviction)) < 1e-5
        held = [CAPACITY if layer in skipped else 24 for layer in range(3)]
        widths = [(4, 16), (2, 28), (4, 16)]  # heads, and numbers of one in keys and values
        states = [0 if layer in skipped else 2 for layer in range(3)]
        assert session.memory().layers == tuple(
            slots * heads * (width + state) * 4
            for slots, (heads, width), state in zip(held, widths, states, strict=True)
        )


@pytest.mark.parametrize("lowered", [True, False])
@pytest.mark.parametrize("style", ["llama", "gqa"])
def test_standard_graph_equals_the_one_lowered_for_the_cpu(style: str, lowered: bool, tmp_path: Path) -> None:
    """The layer that does not evict is lowered to GroupQueryAttention."""
    decoder, eviction = random_decoder(style), dataclasses.replace(BUDGET, skip_layers=(1,))
    session = opened(tmp_path / "b", decoder, eviction, lowered=lowered)
    assert graph_file(session.bundle, "cpu") == ("decoder.cpu.onnx" if lowered else "decoder.onnx")
    if lowered:
        assert b"GroupQueryAttention" in (tmp_path / "b" / "decoder.cpu.onnx").read_bytes()
    assert differences(session, Reference(decoder, eviction)) < 1e-5
    prompts = [tokens(50, seed=1), tokens(7, seed=2)]
    actual = session.prefill(prompts), session.step([5, 6])
    for row, prompt in enumerate(prompts):
        reference_model = Reference(decoder, eviction)
        np.testing.assert_allclose(actual[0][row], reference_model.read(prompt)[-1], **CLOSE)
        np.testing.assert_allclose(actual[1][row], reference_model.step(5 + row), **CLOSE)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_limits_chunks_to_what_can_be_evicted(chunk: int, tmp_path: Path) -> None:
    decoder = random_decoder("gqa")
    session = opened(tmp_path / "b", decoder, BUDGET, chunk=chunk)
    assert BUDGET.chunk == 5
    assert differences(session, Reference(decoder, BUDGET, chunk=min(chunk, 5))) < 1e-5


def test_score_equals_the_reference_for_each_sequence(tmp_path: Path) -> None:
    decoder = random_decoder("gqa")
    session = opened(tmp_path / "b", decoder, BUDGET)
    windows = [tokens(70, seed=1), tokens(70, seed=2)]
    scored = session.score(windows)
    for row, ids in enumerate(windows):
        np.testing.assert_allclose(scored[row], Reference(decoder, BUDGET).read(ids), **CLOSE)


@pytest.mark.parametrize("skipped", [(), (1,)])
def test_prompts_of_unequal_length_in_a_batch(skipped: tuple[int, ...], tmp_path: Path) -> None:
    decoder, eviction = random_decoder("gqa"), dataclasses.replace(BUDGET, skip_layers=skipped)
    session = opened(tmp_path / "b", decoder, eviction)
    prompts = [tokens(length, seed=length) for length in (1, 60, 24, 7, 23, 31)]
    reference_models = [Reference(decoder, eviction) for _ in prompts]
    actual = session.prefill(prompts)
    for row, prompt in enumerate(prompts):
        np.testing.assert_allclose(actual[row], reference_models[row].read(prompt)[-1], **CLOSE)
    for step in range(20):
        following = tokens(len(prompts), seed=100 + step)
        actual = session.step(following)
        for row, token in enumerate(following):
            np.testing.assert_allclose(actual[row], reference_models[row].step(token), **CLOSE)


def test_inactive_sequences_do_not_change(tmp_path: Path) -> None:
    """Sequences with room, full sequences and empty ones."""
    decoder = random_decoder("gqa")
    session = opened(tmp_path / "b", decoder, BUDGET)
    prompts = [tokens(length, seed=length) for length in (3, 24, 40)]
    session.prefill(prompts)
    reference_models = [Reference(decoder, BUDGET) for _ in prompts]
    last = [
        reference_model.read(prompt)[-1]
        for reference_model, prompt in zip(reference_models, prompts, strict=True)
    ]
    random = np.random.default_rng(0)
    for step in range(60):
        active = random.random(3) < 0.5
        following = tokens(3, seed=step)
        actual = session.step(following, active)
        for row in range(3):
            if active[row]:
                last[row] = reference_models[row].step(following[row])
            np.testing.assert_allclose(actual[row], last[row], **CLOSE)
    assert session.lengths.tolist() == [reference_model.seen for reference_model in reference_models]
    session.reset(2)
    alone = Reference(decoder, BUDGET)
    for token in tokens(30):
        session.step([token, 0], np.array([True, False]))
        alone.step(token)
    other = Reference(decoder, BUDGET)
    for token in tokens(30, seed=1):
        np.testing.assert_allclose(
            session.step([0, token], np.array([False, True]))[1], other.step(token), **CLOSE
        )
    np.testing.assert_allclose(session.step([3, 3])[0], alone.step(3), **CLOSE)


def test_buffers_grow_in_steps_up_to_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvexport.runtime.backends.select.STEP", 32)
    decoder, eviction = random_decoder("gqa"), Eviction("l2-norm", 40, 4, 8, skip_layers=(1,))
    session, reference_model = opened(tmp_path / "b", decoder, eviction, 90), Reference(decoder, eviction, 90)
    per_token = 2 * (8 + 8) * 4
    evicting = per_token + 2 * 2 * 4
    sizes = {}
    for token in tokens(90):
        np.testing.assert_allclose(session.step([token])[0], reference_model.step(token), **CLOSE)
        memory = session.memory()
        sizes[memory.capacity] = memory.layers
        assert memory.bytes_allocated == sum(memory.layers) <= memory.bytes_limit
    assert sizes == {each: (min(each, 40) * evicting, each * per_token) for each in (32, 64, 90)}
    assert memory.bytes_limit == session.bundle.kv_bytes(90) == 40 * evicting + 90 * per_token
    assert memory.budget == 40 and memory.bytes_per_token == evicting + per_token


def test_buffers_stay_at_the_budget_if_all_layers_evict(tmp_path: Path) -> None:
    session = opened(tmp_path / "b", random_decoder("gqa"), BUDGET)
    session.prefill(tokens(5))
    memory = session.memory()
    assert (memory.capacity, memory.capacity_limit) == (CAPACITY, CAPACITY)
    assert memory.bytes_allocated == memory.bytes_limit == Bundle.open(session.bundle.path).kv_bytes(CAPACITY)
    addresses = [buffer.ctypes.data for buffer in session.core.decoder.cache.buffers.values()]
    for token in tokens(CAPACITY - 5):
        session.step([token])
    assert session.memory() == memory
    assert [buffer.ctypes.data for buffer in session.core.decoder.cache.buffers.values()] == addresses
    with pytest.raises(UsageError, match="97 tokens"):
        session.step([1])


def test_generates_beyond_the_budget_up_to_the_capacity(tmp_path: Path) -> None:
    decoder = random_decoder("gqa", vocab=320)
    bundle = write_bundle(
        tmp_path / "b", decoder, capacity=CAPACITY, eviction=BUDGET, tokenizer=byte_level_tokenizer()
    )
    session, reference_model = open_bundle(bundle, threads=1), Reference(decoder, BUDGET)
    prompt = tokens(50)
    logits, made = reference_model.read(prompt)[-1], []
    while len(made) < CAPACITY - 50 + 1:
        made.append(int(logits.argmax()))
        if len(made) <= CAPACITY - 50:
            logits = reference_model.step(made[-1])
    actual = session.generate(prompt, max_new_tokens=1000, stop=[])
    assert (actual.token_ids, actual.finish_reason) == (tuple(made), "capacity")
    several = session.generate([prompt, prompt[:7], prompt[:30]], max_new_tokens=20, stop=[])
    assert several[0].token_ids == tuple(made[:20])
    for each, length in zip(several, (50, 7, 30), strict=True):
        assert each.token_ids == session.generate(prompt[:length], max_new_tokens=20, stop=[]).token_ids
    assert "".join(session.stream("Once upon a time there was", max_new_tokens=40, stop=[]))


# The paper's protocol.


@pytest.mark.parametrize("policy", POLICIES)
def test_compress_once_equals_the_reference(policy: str, tmp_path: Path) -> None:
    decoder, eviction = random_decoder("gqa"), Eviction(policy, 24, 2, 5, skip_layers=(1,))
    session = opened(tmp_path / "b", decoder, eviction, compress_once=True)
    prompts = [tokens(length, seed=length) for length in (60, 24, 9, 33)]
    actual = session.prefill(prompts)
    assert session.memory().layers[0] == 4 * 24 * 2 * (16 + 2) * 4  # and no more
    reference_models = []
    for row, prompt in enumerate(prompts):
        reference_model = Reference(decoder, None)
        np.testing.assert_allclose(actual[row], reference_model.read(prompt)[-1], **CLOSE)
        reference_models.append(_compressed(decoder, eviction, prompt))
    for step in range(12):
        following, active = tokens(4, seed=step), np.array([True, step % 2 == 1, True, step % 3 == 0])
        logits = session.step(following, active)
        for row in range(4):
            expected = reference_models[row].step(following[row]) if active[row] else 0.0 * logits[row]
            np.testing.assert_allclose(logits[row], expected, **CLOSE)
    scored = session.score([prompts[0], prompts[0]])
    np.testing.assert_allclose(scored[1], Reference(decoder, None).read(prompts[0]), **CLOSE)
    np.testing.assert_allclose(
        session.step([7, 8])[1], _compressed(decoder, eviction, prompts[0]).step(8), **CLOSE
    )
    session.reset()
    plain = Reference(decoder, eviction)
    for token in tokens(40):
        np.testing.assert_allclose(session.step([token])[0], plain.step(token), **CLOSE)


def _compressed(decoder: Decoder, eviction: Eviction, prompt: Sequence[int]) -> Reference:
    """Equal to the reference's `compressed` after the whole prompt."""
    reference_model = Reference(decoder, eviction, chunk=len(prompt))
    for index, layer in enumerate(decoder.layers):
        attention = layer.attention
        if eviction.evicts(index):
            widths = attention.key_dim, attention.value_dim
            reference_model.cache[index] = EvictingCache.empty(
                1,
                attention.num_kv_heads,
                widths,
                torch.float32,
                eviction,
                index,
                CAPACITY,
                attention.window,
                CAPACITY,
            )
    reference_model.read(prompt)
    next_one = torch.tensor([len(prompt)])
    reference_model.cache = [
        each.compressed(next_one) if isinstance(each, EvictingCache) else each
        for each in reference_model.cache
    ]
    return reference_model


def test_compress_once_differs_from_eviction_during_prefill(tmp_path: Path) -> None:
    """Control of the test above."""
    decoder = random_decoder("gqa")
    session = opened(tmp_path / "b", decoder, BUDGET, compress_once=True)
    assert differences(session, Reference(decoder, BUDGET)) > 1e-3


def test_compress_once_needs_a_budget(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", random_decoder("gqa"))
    with pytest.raises(UsageError, match="kvexport build --kv-budget"):
        open_bundle(bundle, compress_once=True)


# Injected faults.


def _stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots are reused without moving their tokens."""
    monkeypatch.setattr(runtime, "moves_for", lambda kept, first: [])


def _values_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = type(HOST).move, [0]

    def move(self: Any, array: Any, moves: Any) -> None:
        calls[0] += 1
        real(self, array, moves if calls[0] % 2 else [])

    monkeypatch.setattr(type(HOST), "move", move)


def _drops_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token of lowest priority is evicted."""
    real = runtime.Ranking.priorities
    monkeypatch.setattr(runtime.Ranking, "priorities", lambda self, *arguments: -real(self, *arguments))


def _no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    real = runtime.Ranking.remaining
    monkeypatch.setattr(
        runtime.Ranking,
        "remaining",
        lambda self, *arguments: real(dataclasses.replace(self, window=None), *arguments),
    )


def _keeps_the_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Freed slots keep their state."""
    real = type(HOST).write_rows

    def write_rows(self: Any, array: Any, rows: slice, values: Any) -> None:
        real(self, array, rows, np.where(values == 0, array[rows], values))

    monkeypatch.setattr(type(HOST), "write_rows", write_rows)


def _never_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last slot is always overwritten."""
    real = runtime.Occupancy.take
    monkeypatch.setattr(
        runtime.Occupancy, "take", lambda self, *arguments: np.minimum(real(self, *arguments), 23)
    )


@pytest.mark.parametrize("fault", [_stays, _values_stay, _drops_the_first, _no_window, _never_full])
def test_detects_injected_faults(
    fault: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = random_decoder("window", window=9)
    session, reference_model = opened(tmp_path / "b", decoder, BUDGET), Reference(decoder, BUDGET)
    fault(monkeypatch)
    assert differences(session, reference_model) > 1e-3


def test_detects_a_state_that_is_not_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the state alone: freed slots are written again before they are attended to."""
    decoder = random_decoder("gqa")
    session = opened(tmp_path / "b", decoder, BUDGET)
    for broken in (False, True):
        if broken:
            _keeps_the_freed(monkeypatch)
        session.prefill(tokens(24))
        session.core.decoder.cache.shrink(0, 15)
        assert session.core.decoder.cache.state(0)[:, 15:].any() == broken


# Evicted tokens, compared with the reference.


def random_state(random: np.random.Generator, heads: int, filled: int, slots: int) -> NDArray[np.float32]:
    """Many equal scores, positions in any order."""
    state = np.zeros((heads, slots, 2), np.float32)
    state[:, :filled, SCORE] = random.integers(-3, 3, (heads, filled))
    for head in range(heads):
        state[head, :filled, POSITION_PLUS_ONE] = 1 + random.permutation(filled + 10)[:filled]
    return state


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("seed", range(6))
def test_make_room_equals_the_reference(window: int | None, seed: int) -> None:
    random = np.random.default_rng(seed)
    heads, slots, filled = 3, 20, int(random.integers(5, 21))
    eviction = Eviction("l2-norm", slots, int(random.integers(0, 4)), int(random.integers(0, 8)))
    keep, position = int(random.integers(1, filled)), filled + 10
    state = random_state(random, heads, filled, slots)
    key, value = (random.random((heads, slots, width), np.float32) for width in (4, 6))
    reference_model = EvictingCache(
        torch.tensor(key)[None],
        torch.tensor(value)[None],
        torch.tensor(state)[None],
        torch.tensor([filled]),
        eviction,
        0,
        CAPACITY,
        window,
    )
    reference_model.shrink(0, keep, torch.tensor([position]))
    # In the middle of a batch, whose other sequences do not change.
    caches = tuple(np.repeat(each[None], 3, 0).reshape(9, 1, slots, -1) for each in (key, value, state))
    assert len(caches) == 3
    runtime.make_room(HOST, caches, slice(3, 6), runtime.Ranking(eviction, window), filled, keep, position)
    for actual, expected, before in zip(
        caches,
        (reference_model.key, reference_model.value, reference_model.state),
        (key, value, state),
        strict=True,
    ):
        np.testing.assert_array_equal(actual[3:6, 0, :keep], expected[0, :, :keep])
        np.testing.assert_array_equal(actual[[0, 1, 2, 6, 7, 8], 0], np.concatenate((before, before)))
    np.testing.assert_array_equal(caches[2][3:6, 0], reference_model.state[0])


def test_moves_neighbouring_slots_together() -> None:
    kept = np.array([[0, 5, 6, 3], [0, 5, 6, 3], [4, 5, 6, 7], [0, 1, 2, 3]])
    moves = runtime.moves_for(kept, 8)
    assert moves == [(8, 2, 1, 5, 2), (10, 1, 0, 4, 4)]
    assert runtime.moves_for(np.array([[0, 5, 8, 3]]), 0) == [(0, 1, 1, 5, 1), (0, 1, 2, 8, 1)]


def test_rejects_tokens_out_of_order(tmp_path: Path) -> None:
    session = opened(tmp_path / "b", random_decoder("gqa"), BUDGET)
    session.prefill(tokens(5))
    for position in (3, 6):
        with pytest.raises(AssertionError, match="continue the sequence"):
            session.core.decoder.run(np.array([[1]]), np.array([[position]]), np.array([[0]]))
    with pytest.raises(AssertionError, match="must not have more tokens"):
        session.core.decoder.run(np.ones((1, 30), np.int64), np.arange(5, 35)[None], np.array([[0]]))


# Functions that validation uses.


def test_fewer_slots_than_the_budget_equal_the_reference(tmp_path: Path) -> None:
    decoder = random_decoder("gqa")
    session = opened(tmp_path / "b", decoder, BUDGET)
    cache = KvCache(session.bundle, 1, "float32", slots=12, step=5, fill=1e4)
    session.core.decoder.use(cache)
    reference_model = Reference(decoder, dataclasses.replace(BUDGET, budget=12))
    for position, token in enumerate(tokens(40)):
        actual = session.core.decoder.run(np.array([[token]]), np.array([[position]]), np.array([[0]]))
        np.testing.assert_allclose(actual[0, 0], reference_model.step(token), **CLOSE)
    assert cache.state(0).shape == (2, 12, 2) and cache.layer(0)[0].shape == (1, 2, 12, 8)
    assert cache.fresh(2).slots == 12


def test_blocked_slots_are_neither_attended_to_nor_written(tmp_path: Path) -> None:
    for style in ("gqa", "window", "bloom"):
        decoder = random_decoder(style)
        session = opened(tmp_path / style, decoder, BUDGET)
        cache = KvCache(session.bundle, 1, "float32", fill=1e4)
        cache.block(12)
        assert cache.layer(0)[0].shape[2] == 24
        session.core.decoder.use(cache)
        reference_model, ids = Reference(decoder, dataclasses.replace(BUDGET, budget=12), chunk=3), tokens(60)
        expected = np.concatenate(
            (reference_model.read(ids[:30]), np.array([reference_model.step(token) for token in ids[30:]]))
        )
        for start, stop in [
            *((start, start + 3) for start in range(0, 30, 3)),
            *((each, each + 1) for each in range(30, 60)),
        ]:
            here = np.arange(stop - start)[None]
            actual = session.core.decoder.run(np.array([ids[start:stop]]), start + here, here)
            np.testing.assert_allclose(actual[0], expected[start:stop], **CLOSE)
        layer = reference_model.cache[0]
        assert isinstance(layer, EvictingCache)
        np.testing.assert_allclose(cache.state(0), layer.state[0], **CLOSE)
        assert (cache.layer(0)[0][0, :, 12:] == 1e4).all()


def test_reads_and_replaces_the_state(tmp_path: Path) -> None:
    decoder = random_decoder("gqa")
    session = opened(tmp_path / "b", decoder, BUDGET)
    session.prefill([tokens(24, seed=1), tokens(24, seed=2)])
    cache = session.core.decoder.cache
    state = cache.state(1)
    np.testing.assert_array_equal(np.sort(state[..., POSITION_PLUS_ONE]), np.tile(np.arange(1, 25), (2, 1)))
    other = state.copy()
    other[:, 7, SCORE] = 1000
    cache.set_state(1, other)
    np.testing.assert_array_equal(cache.state(1), other)
    session.step([3, 3])
    assert (cache.state(1)[:, 7, POSITION_PLUS_ONE] == 25).all() and (
        cache.state(0)[:, 7, POSITION_PLUS_ONE] == 25
    ).sum() < 2
    cache.set_state(1, other[:, :5])
    np.testing.assert_array_equal(cache.state(1)[:, :5], other[:, :5])
    assert not cache.state(1)[:, 5:].any()
    cache.set_state(1, np.concatenate((other, np.zeros_like(other)), axis=1))
    with pytest.raises(AssertionError, match="must be in usable slots"):
        cache.set_state(1, np.concatenate((other, other), axis=1))
