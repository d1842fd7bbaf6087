"""Layers with a sliding window hold the window and one chunk, and give what a cache of all tokens gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.simulated_device import SimulatedDevice, add_engine, only_gpu
from support.tiny_bundles import exact_logits, write_bundle

from kvexport.bundle import Bundle
from kvexport.bundle.graph_io import KEY, past
from kvexport.bundle.manifest import read_manifest
from kvexport.errors import UsageError
from kvexport.eviction.config import Eviction
from kvexport.model.decoder import Decoder
from kvexport.model.loader import load_decoder
from kvexport.runtime import Cache, Session
from kvexport.runtime.cache.kv_cache import KvCache
from kvexport.runtime.cache.rings import Rings

CAPACITY, WINDOW, CHUNK = 120, 7, 8
RING = WINDOW + CHUNK
CLOSE = {"rtol": 0, "atol": 1e-4}
ENGINES = ("std24", "decomposed17")
KINDS = ("cpu", "cuda", *ENGINES)
Opened = Callable[..., Session]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimulatedDevice:
    return only_gpu(monkeypatch)


@pytest.fixture(scope="module")
def decoders(tiny_checkpoint: Callable[..., Path]) -> dict[str, Decoder]:
    """Mistral with windows in all layers, and Qwen2 with a window in its second layer."""
    return {
        "mistral": load_decoder(
            tiny_checkpoint("mistral", sliding_window=WINDOW, max_position_embeddings=256)
        ),
        "qwen2": load_decoder(
            tiny_checkpoint(
                "qwen2",
                sliding_window=WINDOW,
                use_sliding_window=True,
                max_window_layers=1,
                max_position_embeddings=256,
            )
        ),
    }


@pytest.fixture(scope="module")
def bundles(
    decoders: dict[str, Decoder], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    made: dict[tuple[str, str], Path] = {}

    def bundle(family: str, kind: str) -> Path:
        if (family, kind) not in made:
            path = tmp_path_factory.mktemp("rings") / "bundle"
            write_bundle(path, decoders[family], capacity=CAPACITY)
            if kind in ENGINES:
                add_engine(path, lowering=kind)
            made[family, kind] = path
        return made[family, kind]

    return bundle


@pytest.fixture
def opened(bundles: Callable[[str, str], Path], device: SimulatedDevice) -> Opened:
    def session(family: str, kind: str = "cpu", chunk: int = CHUNK) -> Session:
        provider = "tensorrt" if kind in ENGINES else kind
        return Session(Bundle.open(bundles(family, kind)), provider=provider, threads=1, chunk=chunk)

    return session


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 67, count).tolist()


def fed(session: Session, cache: Cache, pieces: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """The logits after each piece: a step for one token, a prefill for several."""
    return np.array(
        [
            session.step(each, cache=cache)[0] if len(each) == 1 else session.prefill(each, cache=cache)[0]
            for each in pieces
        ]
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_chunks_and_steps_far_beyond_the_ring_equal_the_reference(
    family: str, kind: str, opened: Opened, decoders: dict[str, Decoder]
) -> None:
    text = tokens(CAPACITY)
    expected = exact_logits(decoders[family], text)
    for chunk in (1, 5, CHUNK, 64):
        session = opened(family, kind, chunk)
        np.testing.assert_allclose(session.prefill(text[:61])[0], expected[60], **CLOSE)
        steps = [session.step([text[at]])[0] for at in range(61, CAPACITY)]
        np.testing.assert_allclose(steps, expected[61:], **CLOSE)
        np.testing.assert_allclose(session.score([text])[0], expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_a_conversation_equal_the_reference(
    kind: str, opened: Opened, decoders: dict[str, Decoder]
) -> None:
    session, text = opened("qwen2", kind), tokens(CAPACITY)
    ends = np.cumsum([11, 1, 7, 1, 1, 30, 1, 2, 1, 40, 1, 1])
    pieces = [text[start:stop] for start, stop in zip([0, *ends], ends, strict=False)]
    expected = exact_logits(decoders["qwen2"], text)[ends - 1]
    cache, other = session.new_cache(), session.new_cache()
    for piece, logits in zip(pieces, expected, strict=True):
        np.testing.assert_allclose(fed(session, cache, [piece])[0], logits, **CLOSE)
        np.testing.assert_allclose(fed(session, other, [piece])[0], logits, **CLOSE)
    cache.clear()
    np.testing.assert_allclose(fed(session, cache, pieces), expected, **CLOSE)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_rows_of_different_lengths_equal_each_row_alone(
    family: str, kind: str, opened: Opened, decoders: dict[str, Decoder]
) -> None:
    session, lengths = opened(family, kind), (50, 3, 23)
    texts = [tokens(length + 44, seed=length) for length in lengths]
    expected = [exact_logits(decoders[family], text) for text in texts]
    cache = session.new_cache(3)
    actual = [session.prefill([text[:n] for text, n in zip(texts, lengths, strict=True)], cache=cache)]
    done = list(lengths)
    for pieces in ((1, 1, 1), (19, 2, 1), (1, 1, 1), (2, 30, 9)):
        prompts = [text[at : at + count] for text, at, count in zip(texts, done, pieces, strict=True)]
        if max(pieces) == 1:
            actual.append(session.step([each[0] for each in prompts], cache=cache))
        else:
            actual.append(session.prefill(prompts, cache=cache))
        done = [at + count for at, count in zip(done, pieces, strict=True)]
        for row, at in enumerate(done):
            np.testing.assert_allclose(actual[-1][row], expected[row][at - 1], **CLOSE)


def test_inactive_rows_stay_as_they_are(opened: Opened, decoders: dict[str, Decoder]) -> None:
    session, text = opened("mistral"), tokens(60)
    expected = exact_logits(decoders["mistral"], text)
    session.prefill([text[:40], text[:22]])
    for at in range(40, 58):
        session.step([text[at], 0], np.array([True, False]))
    logits = session.step([text[58], text[22]])
    np.testing.assert_allclose(logits, expected[[58, 22]], **CLOSE)


@pytest.mark.parametrize("kind", ["cpu", "std24", "decomposed17"])
def test_generation_equals_the_reference(kind: str, opened: Opened, decoders: dict[str, Decoder]) -> None:
    prompt = tokens(33)
    generated = opened("mistral", kind).generate(prompt, max_new_tokens=50, stop=[]).token_ids
    text = [*prompt, *generated]
    assert exact_logits(decoders["mistral"], text)[32:-1].argmax(1).tolist() == list(generated)


@pytest.mark.parametrize("kind", ["cpu", "cuda", *ENGINES])
@pytest.mark.parametrize("length", [5, 12, 57])
def test_a_saved_cache_continues_with_any_chunk(
    length: int, kind: str, opened: Opened, decoders: dict[str, Decoder], tmp_path: Path
) -> None:
    text = tokens(CAPACITY)
    expected = exact_logits(decoders["qwen2"], text)
    session = opened("qwen2", kind)
    cache = session.new_cache()
    session.prefill(text[:length], cache=cache)
    cache.save(tmp_path / "cache")
    for chunk in (1, CHUNK, 90):
        other = opened("qwen2", kind, chunk)
        loaded = other.load(tmp_path / "cache")
        pieces = [[text[length]], text[length + 1 : length + 30], [text[length + 30]]]
        np.testing.assert_allclose(
            fed(other, loaded, pieces), expected[[length, length + 29, length + 30]], **CLOSE
        )


def test_a_saved_cache_holds_at_most_the_window(opened: Opened, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    session = opened("qwen2")
    cache = session.new_cache(2)
    session.prefill([tokens(50), tokens(4)], cache=cache)
    cache.save(tmp_path / "cache")
    shapes = {name: array.shape[2] for name, array in load_file(tmp_path / "cache").items()}
    assert {past(0, KEY): 50, past(1, KEY): WINDOW}.items() <= shapes.items()
    again = session.load(tmp_path / "cache")
    again.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "cache").read_bytes()


def test_a_saved_ring_may_have_more_slots_than_its_window(
    opened: Opened, decoders: dict[str, Decoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The C++ library saves all slots of a ring."""
    text = tokens(60)
    session = opened("mistral")
    cache = session.new_cache()
    session.prefill(text[:50], cache=cache)
    smallest = KvCache.shape_of
    for slots in (WINDOW + 3, 50):

        def more(self: KvCache, name: str, batch: int, tokens: int, filled: int, slots: int = slots):  # type: ignore[no-untyped-def]
            shape = smallest(self, name, batch, tokens, filled)
            return (*shape[:2], min(slots, RING), shape[3])

        with monkeypatch.context() as patch:
            patch.setattr(KvCache, "shape_of", more)
            cache.save(tmp_path / "cache")
        loaded = session.load(tmp_path / "cache")
        expected = exact_logits(decoders["mistral"], text)
        np.testing.assert_allclose(fed(session, loaded, [text[50:]])[0], expected[-1], **CLOSE)

    def fewer(self: KvCache, name: str, batch: int, tokens: int, filled: int) -> tuple[int, ...]:
        return (1, 2, WINDOW - 1, smallest(self, name, batch, tokens, filled)[3])

    with monkeypatch.context() as patch:
        patch.setattr(KvCache, "shape_of", fewer)
        cache.save(tmp_path / "cache")
    with pytest.raises(UsageError, match="do not match the sequences"):
        session.load(tmp_path / "cache")


def test_memory_counts_the_window_and_one_chunk(opened: Opened, decoders: dict[str, Decoder]) -> None:
    session = opened("qwen2")
    ring, linear = (
        2 * 4 * layer.attention.num_kv_heads * layer.attention.head_dim
        for layer in reversed(decoders["qwen2"].layers)
    )
    session.prefill(tokens(3))
    assert session.memory().layers == (CAPACITY * linear, RING * ring)
    assert session.memory().bytes_limit == CAPACITY * linear + RING * ring
    session.prefill(tokens(CAPACITY))
    assert session.memory().layers == (CAPACITY * linear, RING * ring)
    manifest = read_manifest(session.bundle.path)
    assert manifest.kv_bytes(CAPACITY) == CAPACITY * (linear + ring)  # chunks of 128 are longer than all
    assert (
        dataclasses.replace(manifest, eviction=Eviction("window", 24, skip_layers=(0, 1))).kv_bytes(CAPACITY)
        == CAPACITY * linear + (WINDOW + 6) * ring
    )


def test_a_ring_grows_with_the_sequence_to_its_size_and_no_further(bundles: Callable[..., Path]) -> None:
    bundle = Bundle.open(bundles("mistral", "cpu"))
    cache = KvCache(bundle, 1, "float32", step=4, chunk=CHUNK)
    sizes = []
    for count in (1, 5, 12, 13, CAPACITY):
        cache.reserve(count)
        sizes.append(cache.buffers[past(0, KEY)].shape[2])
    assert sizes == [4, 8, 12, RING, RING]
    assert cache.capacity == CAPACITY


def test_a_call_that_wraps_is_refused(bundles: Callable[..., Path]) -> None:
    cache = KvCache(Bundle.open(bundles("mistral", "cpu")), 1, "float32", chunk=CHUNK)
    cache.reserve(CAPACITY)
    cache.admit(np.arange(RING)[None])
    cache.admit(RING + np.arange(CHUNK)[None])
    with pytest.raises(AssertionError, match="must not wrap"):
        cache.admit(RING - 1 + np.arange(2)[None])
    with pytest.raises(AssertionError, match="must not wrap"):  # a token would overwrite what it attends to
        cache.admit(RING + np.arange(CHUNK + 1)[None])


def test_calls_are_as_long_as_the_rings_of_all_rows_allow() -> None:
    rings = Rings({4: 10, 6: 12}, 100)
    assert rings.tokens_of_call(np.array([0]), 50) == 10
    assert rings.tokens_of_call(np.array([10]), 50) == 2
    assert rings.tokens_of_call(np.array([20]), 50) == 4
    assert rings.tokens_of_call(np.array([24]), 50) == 6
    assert rings.tokens_of_call(np.array([24, 29]), 50) == 1
    assert rings.tokens_of_call(np.array([24]), 3) == 3
    assert Rings({4: 100}, 100).tokens_of_call(np.array([7]), 93) == 93
