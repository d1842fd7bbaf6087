"""Logits of a session equal the reference's for any batch, chunk size and growth of the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.tiny_bundles import exact_logits, write_bundle

from kvexport.bundle import Bundle
from kvexport.errors import BundleError, CannotRunHere, UsageError
from kvexport.model.decoder import Decoder
from kvexport.runtime import Session, open_bundle
from kvexport.runtime.cache.kv_cache import KvCache

Opened = Callable[..., Session]
CLOSE = {"rtol": 0.0, "atol": 1e-4}  # float32, logits of about 1


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 67, count).tolist()


def test_score_equals_the_reference(opened: Opened, decoder: Decoder) -> None:
    ids = tokens(300)
    scored = opened().score([ids])
    assert scored.shape == (1, 300, 67) and scored.dtype == np.float32
    expected = exact_logits(decoder, ids)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(scored[0], expected, **CLOSE)


def test_float16_bundle_is_close_to_the_reference(decoder: Decoder, tmp_path: Path) -> None:
    session = open_bundle(write_bundle(tmp_path / "half", decoder, dtype="float16"), threads=1)
    ids = tokens(40)
    np.testing.assert_allclose(session.score([ids])[0], exact_logits(decoder, ids), atol=0.05)
    assert session.memory().bytes_per_token == 2 * (4 * 16 + 2 * (12 + 16))
    np.testing.assert_allclose(session.prefill(ids), session.score([ids])[:, -1], atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 7, 40, 1000])
def test_chunk_size_does_not_change_logits(opened: Opened, chunk: int) -> None:
    ids = tokens(40)
    session, whole = opened(chunk=chunk), opened()
    np.testing.assert_allclose(session.prefill(ids), whole.prefill(ids), **CLOSE)
    np.testing.assert_allclose(session.score([ids]), whole.score([ids]), **CLOSE)


@pytest.mark.parametrize("chunk", [4, 64])
def test_batch_of_different_lengths_equals_single_prompts(opened: Opened, chunk: int) -> None:
    """Prompts that end in the first chunk, at the end of one, and within the last, then decoded together."""
    prompts = [tokens(length, seed=length) for length in (1, 13, 8, 4, 5)]
    session, alone = opened(chunk=chunk), opened()
    prefilled = session.prefill(prompts)
    assert session.lengths.tolist() == [1, 13, 8, 4, 5]
    following = np.array([tokens(6, seed=100 + row) for row in range(5)])
    stepped = [session.step(column) for column in following.T]
    for row, prompt in enumerate(prompts):
        np.testing.assert_allclose(prefilled[row], alone.prefill(prompt)[0], **CLOSE)
        for column, token in enumerate(following[row]):
            np.testing.assert_allclose(stepped[column][row], alone.step([token])[0], **CLOSE)


def test_decoding_equals_prefill_while_the_cache_grows(opened: Opened, decoder: Decoder) -> None:
    """600 single steps through all three sizes of the cache."""
    ids = tokens(600)
    session = opened()
    stepped, sizes = [], set()
    for token in ids:
        stepped.append(session.step([token])[0])
        sizes.add(session.memory().capacity)
    assert sizes == {256, 512, 600}
    np.testing.assert_allclose(np.array(stepped), exact_logits(decoder, ids), **CLOSE)


def test_inactive_sequence_does_not_change(opened: Opened) -> None:
    session, alone = opened(), opened()
    prompts = [tokens(5, seed=1), tokens(9, seed=2)]
    session.prefill(prompts)
    for token in tokens(4, seed=3):
        session.step([66, token], np.array([False, True]))
    assert session.lengths.tolist() == [5, 13]
    alone.prefill(prompts[0])
    np.testing.assert_allclose(session.step([7, 7])[0], alone.step([7])[0], **CLOSE)


def test_continues_beside_a_full_sequence(opened: Opened) -> None:
    session, alone = opened(), opened()
    prompts = [tokens(600, seed=1), tokens(3, seed=2)]
    logits = session.prefill(prompts)
    again = session.step([0, 5], np.array([False, True]))
    np.testing.assert_allclose(again[0], logits[0], **CLOSE)
    alone.prefill(prompts[1])
    np.testing.assert_allclose(again[1], alone.step([5])[0], **CLOSE)


def test_prefill_starts_from_an_empty_cache(opened: Opened) -> None:
    session = opened()
    first = session.prefill(tokens(20))
    session.prefill([tokens(500, seed=4), tokens(3, seed=5)])
    assert session.memory().capacity == 512
    np.testing.assert_array_equal(session.prefill(tokens(20)), first)
    assert session.memory().capacity == 256 and session.memory().batch == 1


def test_returned_logits_are_not_overwritten(opened: Opened) -> None:
    session = opened()
    first = session.prefill(tokens(3))
    kept = [first, session.step([1]), session.step([2])]
    copies = [logits.copy() for logits in kept]
    session.step([3])
    session.score([tokens(4)])
    for logits, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(logits, copy)


def test_memory_reports_allocated_bytes(opened: Opened) -> None:
    session = opened()
    session.prefill([tokens(3), tokens(300, seed=1)])
    memory = session.memory()
    layers = [4 * 4 * 16, 4 * 2 * (12 + 16)]  # bytes of a token, layer by layer
    assert (memory.batch, memory.capacity, memory.capacity_limit) == (2, 512, 600)
    assert memory.layers == tuple(2 * 512 * size for size in layers)
    assert memory.bytes_per_token == sum(layers)
    assert memory.bytes_allocated == 2 * 512 * sum(layers)
    assert memory.bytes_limit == 2 * 600 * sum(layers)
    session.reset()
    assert session.memory().bytes_allocated == 0


@pytest.mark.parametrize(
    ("prompts", "text"),
    [
        ([], "at least one prompt"),
        ([[]], "empty"),
        ([[1], []], "empty"),
        ([3, 67], "inside the vocabulary"),
        ([[3], [-1]], "inside the vocabulary"),
        ([2**70], "must be integers"),
        ([[1.5]], "must be integers"),
        ([["a"]], "must be integers"),
        ([1] * 601, "601 tokens"),
    ],
)
def test_rejects_invalid_prompts(opened: Opened, prompts: list[object], text: str) -> None:
    session = opened()
    session.prefill([4, 5])
    with pytest.raises(UsageError, match=text):
        session.prefill(prompts)  # type: ignore[arg-type]
    assert session.lengths.tolist() == [2]  # as it was before


def test_rejected_steps_change_nothing(opened: Opened) -> None:
    session = opened()
    session.prefill([tokens(600), tokens(3)])
    for ids, text in (
        ([1], "2"),
        ([1, 2, 3], "2"),
        ([1, 67], "vocabulary"),
        ([-1, 1], "vocabulary"),
        ([1, 1], "601 tokens"),
    ):
        with pytest.raises(UsageError, match=text):
            session.step(ids)
    assert session.lengths.tolist() == [600, 3]


def test_score_rejects_anything_but_a_batch(opened: Opened) -> None:
    for ids in ([1, 2], [[]], [[1], [2, 3]], [[1] * 601], [[67]]):
        with pytest.raises(UsageError):
            opened().score(ids)


def test_error_of_a_long_prompt_names_the_fix(decoder: Decoder, tiny_bundle: Path, tmp_path: Path) -> None:
    session = open_bundle(tiny_bundle, threads=1)  # the model was trained for 1024 positions
    with pytest.raises(UsageError, match="--capacity 700"):
        session.prefill([1] * 700)
    whole = open_bundle(write_bundle(tmp_path / "whole", decoder, capacity=1024), threads=1)
    with pytest.raises(UsageError, match="trained for 1024 positions"):
        whole.prefill([1] * 1025)


def test_rejects_options_out_of_range(tiny_bundle: Path) -> None:
    for options, message in (({"threads": 0}, "threads"), ({"chunk": 0}, "chunk must be at least 1")):
        with pytest.raises(UsageError, match=message):
            Session(Bundle.open(tiny_bundle), **options)
    with pytest.raises(UsageError, match="batch must be at least 1"):
        Session(Bundle.open(tiny_bundle), threads=1).reset(0)


def test_reports_that_memory_is_exhausted(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has the numbers, and the cache is unchanged."""
    session, alone = opened(), opened()
    ids = tokens(256)
    session.prefill(ids)
    real, left = np.zeros, [2]

    def zeros(shape: tuple[int, ...], dtype: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError
        return real(shape, dtype)

    with monkeypatch.context() as patched:
        patched.setattr("kvexport.runtime.cache.kv_cache.np.zeros", zeros)
        with pytest.raises(CannotRunHere, match="512 tokens"):
            session.core.decoder.cache.reserve(257)
    alone.prefill(ids)
    np.testing.assert_allclose(session.step([1]), alone.step([1]), **CLOSE)
    assert session.memory().capacity == 512


def test_new_slots_are_zero_or_filled(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    cache = KvCache(bundle, 1, "float32", fill=3.0, step=10)
    cache.reserve(4)
    key, value = cache.layer(1)
    assert key.shape == (1, 2, 10, 12) and value.shape == (1, 2, 10, 16)
    key[:, :, :10] = 5
    cache.reserve(11)
    assert cache.capacity == 20
    key, value = cache.layer(1)
    assert (key[:, :, :10] == 5).all() and (key[:, :, 10:] == 3).all() and (value == 3).all()
    with pytest.raises(UsageError, match="601"):
        cache.reserve(601)
    cache.reserve(600)
    assert cache.capacity == 600


def test_logits_that_are_not_finite_are_an_error(tiny_bundle: Path) -> None:
    session = open_bundle(tiny_bundle, threads=1)
    session.prefill([1, 2, 3])
    session.core.decoder.cache.layer(0)[1][...] = np.nan
    broken = session.step([1])
    assert np.isnan(broken).all()
    from kvexport.runtime.sampling import Sampling

    with pytest.raises(BundleError, match="must be finite"):
        Sampling().choose(broken[0], np.random.default_rng(0))
    assert np.isfinite(session.prefill([1, 2, 3])).all()  # a new prompt is not haunted by it
