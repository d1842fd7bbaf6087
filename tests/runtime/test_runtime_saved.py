"""Saved caches: generation continues as without saving, and damaged files are rejected."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from support.simulated_device import SimulatedDevice, add_engine, only_gpu
from support.tiny_bundles import write_bundle
from test_runtime_evicting import BUDGET, CAPACITY, random_decoder, tokens

from kvexport.bundle import Bundle
from kvexport.errors import KvexportError, UsageError
from kvexport.eviction.config import Eviction
from kvexport.model.decoder import Decoder
from kvexport.runtime import Cache, Session
from kvexport.runtime.cache import saved_cache as saved
from kvexport.runtime.cache.device_arrays import HOST, DeviceStorage
from kvexport.runtime.cache.eviction import Occupancy
from kvexport.runtime.cache.kv_cache import KvCache

EVICTIONS = {"whole": None, "evicting": BUDGET, "some": Eviction("l2-norm", 24, 2, 5, skip_layers=(1,))}
whatever_is_held = pytest.mark.parametrize("eviction", EVICTIONS.values(), ids=EVICTIONS.keys())
VOCAB = 40


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimulatedDevice:
    return only_gpu(monkeypatch)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return random_decoder("gqa")


@pytest.fixture(scope="module")
def bundles(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A bundle with an engine of each form; `provider="tensorrt"` uses the first. Shared."""
    made: dict[Any, Path] = {}

    def bundle(eviction: Eviction | None = None, dtype: str = "float32") -> Path:
        if (eviction, dtype) not in made:
            path = tmp_path_factory.mktemp("saved") / "b"
            made[eviction, dtype] = write_bundle(
                path, decoder, capacity=CAPACITY, eviction=eviction, dtype=dtype
            )
            add_engine(path)
        return made[eviction, dtype]

    return bundle


Opened = Callable[..., Session]


@pytest.fixture
def opened(bundles: Callable[..., Path]) -> Opened:
    def session(eviction: Eviction | None = None, dtype: str = "float32", provider: str = "cpu") -> Session:
        return Session(Bundle.open(bundles(eviction, dtype)), provider=provider, threads=1)

    return session


def following(session: Session, cache: Cache) -> list[Any]:
    """Logits of steps and a prompt that continue a cache."""
    rows = range(cache.batch)
    steps = [session.step([(3 * step + row) % VOCAB for row in rows], cache=cache) for step in range(6)]
    return [*steps, session.prefill([tokens(9 + row, seed=row) for row in rows], cache=cache)]


@whatever_is_held
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_loaded_cache_continues_bit_by_bit(
    eviction: Eviction | None, dtype: str, opened: Opened, tmp_path: Path
) -> None:
    session = opened(eviction, dtype)
    cache = session.new_cache(batch=3)
    session.generate([tokens(n, seed=n) for n in (40, 3, 17)], max_new_tokens=5, stop=[], cache=cache)
    cache.save(tmp_path / "c")
    other = opened(eviction, dtype)  # a restart
    again = other.load(tmp_path / "c")
    assert again.lengths.tolist() == cache.lengths.tolist() == [44, 7, 21] and again.batch == 3
    assert again.sequences.pending == cache.sequences.pending != [[], [], []]
    for one, two in zip(following(session, cache), following(other, again), strict=True):
        np.testing.assert_array_equal(one, two)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@whatever_is_held
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_backends_load_each_others_caches(
    eviction: Eviction | None, provider: str, opened: Opened, device: SimulatedDevice, tmp_path: Path
) -> None:
    sessions = opened(eviction), opened(eviction, provider=provider)
    for one, other in (sessions, sessions[::-1]):
        cache = one.new_cache()
        one.prefill(tokens(50), cache=cache)
        cache.save(tmp_path / "c")
        loaded = other.load(tmp_path / "c")
        for expected, actual in zip(following(one, cache), following(other, loaded), strict=True):
            np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_saves_and_loads_empty_caches(opened: Opened, tmp_path: Path) -> None:
    for eviction in EVICTIONS.values():
        session = opened(eviction)
        cache = session.new_cache(batch=2)
        for _ in range(2):
            cache.save(tmp_path / "c")
            loaded = session.load(tmp_path / "c")
            assert loaded.lengths.tolist() == [0, 0] and loaded.bytes == 0
            np.testing.assert_array_equal(
                session.prefill([[1, 2], [3]], cache=loaded), session.prefill([[1, 2], [3]])
            )
            session.prefill([[1], [2]], cache=cache)
            cache.clear()


@whatever_is_held
def test_a_saved_cache_is_a_safetensors_file(
    eviction: Eviction | None, opened: Opened, tmp_path: Path
) -> None:
    session = opened(eviction, "float16")
    cache = session.new_cache(batch=2)
    session.generate([tokens(40), tokens(5)], max_new_tokens=2, stop=[], cache=cache)
    cache.save(tmp_path / "c")
    with safe_open(tmp_path / "c", "np") as file:
        metadata, names = file.metadata(), list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
    assert metadata.keys() == {"kvexport", "bundle", "sha256", "state"} and metadata["kvexport"] == "cache 1"
    assert (
        metadata["bundle"]
        == json.loads((session.bundle.path / "manifest.json").read_text())["manifest_sha256"]
    )
    whole = (tmp_path / "c").read_bytes()
    assert hashlib.sha256(whole[8 + int.from_bytes(whole[:8], "little") :]).hexdigest() == metadata["sha256"]
    state = json.loads(metadata["state"])
    assert state["lengths"] == [41, 6] and [len(each) for each in state["pending"]] == [1, 1]
    assert state["filled"] == (None if eviction is None else [24, 6]) and state["seen"] == (
        None if eviction is None else [41, 6]
    )
    for layer in range(2):
        evicts = eviction is not None and eviction.evicts(layer)
        key = tensors[f"past_key_values.{layer}.key"]
        assert key.dtype == np.float16 and key.shape == ((4, 1, 24, 8) if evicts else (2, 2, 41, 8))
        assert not key.reshape(2, 2, -1, 8)[1, :, 6:].any() and key.reshape(2, 2, -1, 8)[1, :, :6].any()
        held = cache.sequences.kv.layer(layer)[0]
        np.testing.assert_array_equal(key.reshape(2, 2, -1, 8)[0], held[0, :, : 24 if evicts else 41])
        assert (f"past_key_values.{layer}.state" in names) == evicts
        if evicts:
            assert tensors[f"past_key_values.{layer}.state"].dtype == np.float32


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_dtype_keeps_its_bits(
    dtype: str,
    there: bool,
    decoder: Decoder,
    device: SimulatedDevice,
    bundles: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """For bfloat16, which has no kernels on the CPU, the buffers alone."""
    bundle = Bundle.open(bundles(BUDGET, dtype))
    kv = KvCache(bundle, 2, dtype, storage=DeviceStorage(device) if there else HOST)
    kv.reserve(30)
    random = np.random.default_rng(0)
    for buffer in kv.buffers.values():
        kind = kv.storage.read(buffer).dtype
        kv.storage.write(buffer, random.integers(0, 200, buffer.shape).astype(kind))
    kv.occupy(Occupancy(np.array([24, 3]), np.array([30, 3])))
    state = saved.SavedState(np.array([30, 3]), np.array([1, 2]), [[], [7]])
    saved.write(tmp_path / "c", "0" * 64, kv, state)
    read, actual = saved.read(tmp_path / "c", "0" * 64, VOCAB, kv)
    assert (actual.lengths.tolist(), actual.last.tolist(), actual.pending) == ([30, 3], [1, 2], [[], [7]])
    assert read.occupancy is not None and read.occupancy.filled.tolist() == [24, 3]
    for name in kv.names:
        one, two = (
            each.storage.read(each.buffers[name]).reshape(2, -1, *each.buffers[name].shape[2:]).copy()
            for each in (kv, read)
        )
        one[1, :, 3:] = 0
        np.testing.assert_array_equal(one, two)


# Damaged files, and files of other bundles.


@pytest.fixture
def written(opened: Opened, tmp_path: Path) -> tuple[Session, Path]:
    session = opened(BUDGET)
    cache = session.new_cache(batch=2)
    session.prefill([tokens(30), tokens(4)], cache=cache)
    cache.save(tmp_path / "c")
    return session, tmp_path / "c"


def edited(
    path: Path, change: Callable[[dict[str, Any]], object], data: Callable[[bytes], bytes] = bytes
) -> Path:
    """Change a file's header and data; the data's digest is corrected unless one is given."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, rest = json.loads(whole[8 : 8 + length]), data(whole[8 + length :])
    header["__metadata__"]["sha256"] = hashlib.sha256(rest).hexdigest()
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest)
    return path


def in_state(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        state = json.loads(header["__metadata__"]["state"]) | changes
        header["__metadata__"]["state"] = json.dumps(state)

    return change


KEY = "past_key_values.0.key"
DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another bundle": (lambda h: h["__metadata__"].update(bundle="0" * 64), "must be of this bundle"),
    "no bundle": (lambda h: h["__metadata__"].pop("bundle"), "bundle is missing"),
    "another kind": (lambda h: h["__metadata__"].update(kvexport="cache 2"), "kvexport has an invalid value"),
    "no metadata": (lambda h: h.pop("__metadata__"), "__metadata__ must be a table"),
    "metadata of another type": (lambda h: h.update(__metadata__=[1]), "__metadata__ must be a table"),
    "another digest": (lambda h: h["__metadata__"].update(sha256="0" * 64), "sha256 differs"),
    "no digest": (lambda h: h["__metadata__"].pop("sha256"), "sha256 is missing"),
    "state no JSON": (lambda h: h["__metadata__"].update(state="{"), "state .* must be JSON"),
    "state no text": (lambda h: h["__metadata__"].update(state=3), "state has an invalid value"),
    "state twice": (
        lambda h: h["__metadata__"].update(state='{"lengths":[1],"lengths":[2]}'),
        "occurs twice",
    ),
    "state deep": (lambda h: h["__metadata__"].update(state="[" * 100_000), "must be JSON"),
    "state another": (in_state(more=1), "unknown key"),
    "no lengths": (in_state(lengths=[]), "lengths"),
    "lengths fewer": (in_state(lengths=[30]), "one number for each"),
    "lengths text": (in_state(lengths=["30", 4]), r"lengths\[0\] has an invalid value"),
    "lengths true": (in_state(lengths=[True, 4]), r"lengths\[0\] has an invalid value"),
    "lengths below 0": (in_state(lengths=[30, -4]), r"lengths\[1\] has an invalid value"),
    "lengths real": (in_state(lengths=[30.0, 4]), r"lengths\[0\] has an invalid value"),
    "lengths huge": (in_state(lengths=[2**80, 4]), r"lengths\[0\] has an invalid value"),
    "too long": (in_state(lengths=[97, 4]), "must fit the capacity"),
    "lengths other": (in_state(lengths=[29, 4]), "the same numbers as lengths"),
    "last outside": (in_state(last=[1, VOCAB]), r"last\[1\] has an invalid value"),
    "pending outside": (in_state(pending=[[], [VOCAB]]), r"pending\[1\] has an invalid value"),
    "two pending": (in_state(pending=[[], [1, 2]]), "pending"),
    "pending flat": (in_state(pending=[1, 2]), "pending"),
    "no slots": (in_state(filled=None), "filled"),
    "too many slots": (in_state(filled=[25, 4]), "at most its length"),
    "more slots than tokens": (in_state(filled=[24, 5]), "at most its length"),
    "nothing in use": (in_state(filled=[24, 0]), "at most its length"),
    "seen other": (in_state(seen=[31, 4]), "the same numbers as lengths"),
    "fewer slots": (in_state(filled=[23, 4]), "do not match the sequences"),
    "a tensor less": (lambda h: h.pop(KEY), "its tensors differ"),
    "a tensor more": (lambda h: h.update(more=h[KEY]), "its tensors differ"),
    "no tensor": (lambda h: h.update({KEY: 3}), "must be a table"),
    "another dtype": (lambda h: h[KEY].update(dtype="F16"), "do not match the sequences"),
    "another shape": (lambda h: h[KEY].update(shape=[4, 1, 8, 24]), "do not match the sequences"),
    "shape of text": (lambda h: h[KEY].update(shape="4"), "shape has an invalid value"),
    "no offsets": (lambda h: h[KEY].update(data_offsets=[0]), "a start and an end"),
    "offsets real": (
        lambda h: h[KEY].update(data_offsets=[0.0, 3072.0]),
        "data_offsets.* has an invalid value",
    ),
    "extent": (lambda h: h[KEY].update(data_offsets=[0, 8]), "does not match its shape"),
    "overlap": (
        lambda h: h[KEY].update(data_offsets=[each + 4 for each in h[KEY]["data_offsets"]]),
        "overlap or leave a gap",
    ),
    "beyond": (
        lambda h: h[KEY].update(data_offsets=[each + 10**9 for each in h[KEY]["data_offsets"]]),
        "overlap or leave a gap",
    ),
    "before": (
        lambda h: h[KEY].update(data_offsets=[each - 10**9 for each in h[KEY]["data_offsets"]]),
        "overlap or leave a gap",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_rejects_damage_before_allocating_memory(
    damage: str, written: tuple[Session, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, path = written
    monkeypatch.setattr(KvCache, "another", lambda *arguments: pytest.fail("memory was taken"))
    change, message = DAMAGES[damage]
    with pytest.raises(UsageError, match=message):
        session.load(edited(path, change))


def test_rejects_truncated_and_extended_files(written: tuple[Session, Path]) -> None:
    session, path = written
    whole = path.read_bytes()
    for content, message in (
        (b"", "header"),
        (whole[:7], "header"),
        (whole[:100], "header"),
        (whole[:-1], "the size of its data differs"),
        (whole + b"\0", "the size of its data differs"),
        (struct.pack("<Q", 2**63) + whole[8:], "header"),
        (struct.pack("<Q", 4) + b"\xff\xff\xff\xff", "header .* must be JSON"),
        (struct.pack("<Q", 2) + b"[]", "must be a table"),
        (struct.pack("<Q", 14) + b'{"a":1,"a":2} ', "occurs twice"),
        (struct.pack("<Q", 10**5) + b"[" * 10**5, "must be JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=message):
            session.load(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rejects_a_flipped_bit_anywhere(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, decoder: Decoder
) -> None:
    session, path = _once(tmp_path_factory, decoder)
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    damaged = path.parent / "damaged"
    damaged.write_bytes(whole)
    try:
        actual = session.load(damaged)
    except KvexportError:
        return
    # Space between header and data, or a state of a sequence that is as valid as the saved one.
    assert at < 8 + int.from_bytes(path.read_bytes()[:8], "little") and actual.lengths.tolist() == [30, 4]


_MADE: list[tuple[Session, Path]] = []


def _once(factory: pytest.TempPathFactory, decoder: Decoder) -> tuple[Session, Path]:
    if not _MADE:
        folder = factory.mktemp("flipped")
        session = Session(
            Bundle.open(write_bundle(folder / "b", decoder, capacity=CAPACITY, eviction=BUDGET)), threads=1
        )
        cache = session.new_cache(batch=2)
        session.prefill([tokens(30), tokens(4)], cache=cache)
        cache.save(folder / "c")
        _MADE.append((session, folder / "c"))
    return _MADE[0]


def test_rejects_a_cache_of_another_bundle(opened: Opened, written: tuple[Session, Path]) -> None:
    _, path = written
    for session in (opened(), opened(BUDGET, "float16")):
        with pytest.raises(
            UsageError, match=r"must be of this bundle[\s\S]*run the bundle that it was saved with"
        ):
            session.load(path)


def test_rejects_a_cache_that_does_not_fit_the_engine(
    decoder: Decoder, device: SimulatedDevice, written: tuple[Session, Path], tmp_path: Path
) -> None:
    session, path = written
    copy = tmp_path / "copy"
    shutil.copytree(session.bundle.path, copy, ignore=shutil.ignore_patterns("engines"))
    add_engine(copy, capacity=25)
    small = Session(Bundle.open(copy), provider="tensorrt")
    with pytest.raises(
        UsageError, match=r"must fit the capacity[\s\S]*30 tokens[\s\S]*engine again with --capacity 30"
    ):
        small.load(path)
    cache = session.new_cache(batch=2)
    session.prefill([[1], [2]], cache=cache)
    cache.save(path)
    with pytest.raises(UsageError, match="the number of sequences must be 1"):
        small.load(path)


def test_rejects_missing_files_and_impossible_paths(opened: Opened, tmp_path: Path) -> None:
    session = opened()
    cache = session.new_cache()
    for path in (tmp_path / "none", tmp_path, tmp_path / "none" / "c"):
        with pytest.raises(UsageError, match="must be an existing file"):
            session.load(path)
    with pytest.raises(UsageError, match="mkdir -p"):
        cache.save(tmp_path / "none" / "c")
    with pytest.raises(UsageError, match="must be a file, not a folder"):
        cache.save(tmp_path)


def test_failed_write_keeps_the_old_file(
    written: tuple[Session, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, path = written
    before, cache = path.read_bytes(), session.new_cache()
    session.prefill([1, 2, 3], cache=cache)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            cache.save(path)
    assert path.read_bytes() == before and [each.name for each in path.parent.iterdir()] == ["c"]
    cache.save(path)
    assert session.load(path).lengths.tolist() == [3]
