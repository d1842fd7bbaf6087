"""Layers that evict on a simulated device, with TensorRT and with ONNX Runtime on CUDA."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.simulated_device import SimulatedDevice, add_engine, only_gpu
from support.tiny_bundles import write_bundle
from test_runtime_evicting import BUDGET, CAPACITY, CLOSE, Reference, differences, random_decoder, tokens

from kvexport.bundle import Bundle
from kvexport.errors import BundleError, UsageError
from kvexport.eviction.config import POLICIES, POSITION_PLUS_ONE, Eviction
from kvexport.model.decoder import Decoder
from kvexport.runtime import Session, open_bundle
from kvexport.runtime.backends import tensorrt as runtime
from kvexport.runtime.backends.tensorrt import TensorRtDecoder
from kvexport.runtime.cache.device_arrays import HOST, DeviceStorage, Move

LOWERINGS = ("std24", "decomposed17")
SKIPPING = dataclasses.replace(BUDGET, skip_layers=(0,))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimulatedDevice:
    """A simulated GPU for TensorRT and ONNX Runtime."""
    monkeypatch.setattr("kvexport.runtime.backends.select._DEVICE_STEP", 16)
    return only_gpu(monkeypatch)


def with_engine(
    path: Path,
    decoder: Decoder,
    eviction: Eviction,
    lowering: str,
    dtype: str = "float32",
    capacity: int | None = None,
) -> Path:
    bundle = write_bundle(path, decoder, dtype=dtype, capacity=CAPACITY, eviction=eviction)
    add_engine(bundle, lowering=lowering, capacity=capacity)
    return bundle


def opened(bundle: Path, decoder: Decoder, provider: str = "tensorrt", **options: Any) -> Session:
    return Session(Bundle.open(bundle), provider=provider, threads=1, **options)


def made(session: Session) -> TensorRtDecoder:
    assert isinstance(session.core.decoder, TensorRtDecoder)
    return session.core.decoder


STYLES: dict[str, Callable[[], Decoder]] = {
    "shared heads": lambda: random_decoder("gqa"),
    "alibi": lambda: random_decoder("bloom"),
    "a window": lambda: random_decoder("window", window=9),
}


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_engines_equal_the_reference(
    lowering: str, style: str, device: SimulatedDevice, tmp_path: Path
) -> None:
    decoder = STYLES[style]()
    for policy, skipped in zip(POLICIES, ((), (0,), (), (1,)), strict=True):
        eviction = dataclasses.replace(BUDGET, policy=policy, skip_layers=skipped)
        session = opened(with_engine(tmp_path / policy, decoder, eviction, lowering), decoder)
        assert differences(session, Reference(decoder, eviction)) < 1e-5
    assert (
        differences(session, Reference(decoder, eviction), prompt=3, steps=40) < 1e-5
    )  # anew, after a first text


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_engine_cache_equals_the_reference_cache(
    lowering: str, device: SimulatedDevice, tmp_path: Path
) -> None:
    decoder = random_decoder("gqa")
    session, reference_model = (
        opened(with_engine(tmp_path / "b", decoder, BUDGET, lowering), decoder),
        Reference(decoder, BUDGET),
    )
    differences(session, reference_model)
    for layer, cache in enumerate(reference_model.cache):
        for actual, expected in zip(
            session.core.decoder.cache.layer(layer), (cache.key, cache.value), strict=True
        ):
            np.testing.assert_allclose(actual, expected, **CLOSE)
        np.testing.assert_allclose(session.core.decoder.cache.state(layer), cache.state[0], **CLOSE)  # type: ignore[union-attr]


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_float16_caches_have_a_float32_state(lowering: str, device: SimulatedDevice, tmp_path: Path) -> None:
    decoder, eviction = random_decoder("gqa"), dataclasses.replace(BUDGET, policy="window")
    session = opened(with_engine(tmp_path / "b", decoder, eviction, lowering, dtype="float16"), decoder)
    assert differences(session, Reference(decoder, eviction)) < 0.05
    stored = session.core.decoder.cache.state(1)[..., POSITION_PLUS_ONE]
    assert sorted(stored[0]) == [1, 2, *range(69, 91)] and (np.sort(stored[0]) == np.sort(stored[1])).all()


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_steps_replay_one_graph_and_allocate_nothing(
    lowering: str, device: SimulatedDevice, tmp_path: Path
) -> None:
    """Slots of evicted tokens are copied to the host with the logits; one copy per head fills them."""
    session = opened(
        with_engine(tmp_path / "b", random_decoder("gqa"), SKIPPING, lowering), random_decoder("gqa")
    )
    session.prefill(tokens(10))
    session.step([1])
    allocations = device.allocations
    addresses = [buffer.address for buffer in session.core.decoder.cache.buffers.values()]
    for token in range(40):
        device.done.clear()
        session.step([token])
        copies = device.done.count("copy_rows")
        report = ["download"] * (lowering == "decomposed17")
        assert device.done == [
            "launch",
            *["upload"] * 4,
            "engine",
            "download",
            *report,
            *["copy_rows"] * copies,
        ]
        assert copies in ((0,) if lowering == "std24" else (5, 8))  # 2, and 3 for both heads or for each
        assert lowering == "std24" or token > 12 or copies == 5
    session.prefill(tokens(60))
    session.step([2])
    assert [buffer.address for buffer in session.core.decoder.cache.buffers.values()] == addresses
    assert device.allocations == allocations


def test_caches_and_states_are_bound_at_one_address(device: SimulatedDevice, tmp_path: Path) -> None:
    decoder = made(
        opened(with_engine(tmp_path / "b", random_decoder("gqa"), BUDGET, "std24"), random_decoder("gqa"))
    )
    assert len(decoder.cache.buffers) == 2 * 3
    for calls in (decoder.decode_calls, decoder.prefill_calls):
        for name, buffer in decoder.cache.buffers.items():
            bound = calls.context.addresses
            assert bound[name] == bound[name.replace("past_key_values", "present")] == buffer.address


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_engine_memory_follows_the_budget(lowering: str, device: SimulatedDevice, tmp_path: Path) -> None:
    bundle = with_engine(tmp_path / "b", random_decoder("gqa"), SKIPPING, lowering, capacity=80)
    session = opened(bundle, random_decoder("gqa"))
    memory = session.memory()
    assert (memory.capacity, memory.capacity_limit, memory.budget) == (80, 80, 24)
    assert memory.bytes_allocated == memory.bytes_limit == session.bundle.kv_bytes(80)
    assert memory.layers == (80 * 2 * 16 * 4, 24 * 2 * 18 * 4)
    assert memory.device is not None and memory.device.kv == memory.bytes_allocated
    actual = session.generate(tokens(60), max_new_tokens=100, stop=[])
    assert actual.finish_reason == "capacity" and len(actual.token_ids) == 21


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_an_engine_of_a_smaller_capacity_than_the_budget_evicts_nothing(
    lowering: str, device: SimulatedDevice, tmp_path: Path
) -> None:
    decoder = random_decoder("gqa")
    session = opened(with_engine(tmp_path / "b", decoder, BUDGET, lowering, capacity=20), decoder)
    assert differences(session, Reference(decoder, None), prompt=9, steps=11) < 1e-5
    assert session.memory().budget == 20


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_engine_respects_blocked_slots(lowering: str, device: SimulatedDevice, tmp_path: Path) -> None:
    decoder = random_decoder("window", window=9)
    engine = made(opened(with_engine(tmp_path / "b", decoder, BUDGET, lowering), decoder))
    for _ in range(2):
        engine.cache.fresh(1)
        engine.cache.block(14)
        reference_model, ids = Reference(decoder, dataclasses.replace(BUDGET, budget=14), chunk=3), tokens(60)
        expected = np.concatenate(
            (reference_model.read(ids[:30]), np.array([reference_model.step(token) for token in ids[30:]]))
        )
        for start, stop in [
            *((start, start + 3) for start in range(0, 30, 3)),
            *((each, each + 1) for each in range(30, 60)),
        ]:
            here = np.arange(stop - start)[None]
            actual = engine.run(np.array([ids[start:stop]]), start + here, here)
            np.testing.assert_allclose(actual[0], expected[start:stop], **CLOSE)


def test_engine_rejects_compress_once(device: SimulatedDevice, tmp_path: Path) -> None:
    bundle = with_engine(tmp_path / "b", random_decoder("gqa"), BUDGET, "std24")
    with pytest.raises(UsageError, match=r"has the size of the budget[\s\S]*--provider cuda or cpu"):
        open_bundle(bundle, provider="tensorrt", compress_once=True)
    assert open_bundle(bundle, provider="cpu", compress_once=True).provider == "cpu"


def test_rejects_an_engine_of_another_budget(device: SimulatedDevice, tmp_path: Path) -> None:
    decoder = random_decoder("gqa")
    bundle = with_engine(tmp_path / "b", decoder, BUDGET, "std24")
    other = tmp_path / "other"
    write_bundle(other, decoder, capacity=CAPACITY, eviction=dataclasses.replace(BUDGET, budget=30))
    (bundle / "engines").rename(other / "engines")
    from kvexport.bundle.engine_record import read_record, write_record

    folder = other / "engines" / "simulated"
    write_record(folder, dataclasses.replace(read_record(folder), manifest_sha256=Bundle.open(other).digest))
    with pytest.raises(BundleError, match=r"must match the bundle in past_key_values\.0\.key"):
        open_bundle(other, provider="tensorrt")


# ONNX Runtime.


@pytest.mark.parametrize("style", STYLES)
def test_cuda_equals_the_reference(style: str, device: SimulatedDevice, tmp_path: Path) -> None:
    decoder = STYLES[style]()
    for eviction in (BUDGET, SKIPPING):
        bundle = write_bundle(
            tmp_path / str(eviction.skip_layers), decoder, capacity=CAPACITY, eviction=eviction
        )
        session = opened(bundle, decoder, "cuda")
        assert session.provider == "cuda" and differences(session, Reference(decoder, eviction)) < 1e-5


def test_batches_on_cuda_equal_those_on_the_cpu(device: SimulatedDevice, tmp_path: Path) -> None:
    decoder = random_decoder("gqa")
    bundle = write_bundle(tmp_path / "b", decoder, capacity=CAPACITY, eviction=SKIPPING)
    for options in ({}, {"compress_once": True}):
        there, here = opened(bundle, decoder, "cuda", **options), opened(bundle, decoder, "cpu", **options)
        prompts = [tokens(length, seed=length) for length in (1, 60, 24, 33)]
        np.testing.assert_allclose(there.prefill(prompts), here.prefill(prompts), **CLOSE)
        for step in range(8):
            following, active = tokens(4, seed=step), np.array([True, step % 2 == 0, True, False])
            np.testing.assert_allclose(there.step(following, active), here.step(following, active), **CLOSE)


def test_a_step_on_cuda_allocates_nothing_and_moves_nothing(device: SimulatedDevice, tmp_path: Path) -> None:
    session = opened(
        write_bundle(tmp_path / "b", random_decoder("gqa"), capacity=CAPACITY, eviction=BUDGET),
        random_decoder("gqa"),
        "cuda",
    )
    session.prefill(tokens(30))
    session.step([1])
    allocations = device.allocations
    addresses = [buffer.address for buffer in session.core.decoder.cache.buffers.values()]
    device.done.clear()
    for _ in range(5):
        session.step([2])
    assert device.done == [*["upload"] * 4, "download"] * 5
    assert device.allocations == allocations
    assert [buffer.address for buffer in session.core.decoder.cache.buffers.values()] == addresses


def test_device_moves_equal_host_moves(device: SimulatedDevice) -> None:
    random = np.random.default_rng(0)
    values = random.random((6, 1, 20, 5), np.float32)
    storage, moves = DeviceStorage(device), [Move(1, 1, 0, 12, 3), Move(2, 3, 4, 10, 2), Move(5, 1, 9, 19, 1)]
    array = storage.zeros(values.shape, "float32")
    storage.write(array, values)
    storage.move(array, moves)
    HOST.move(values, moves)
    np.testing.assert_array_equal(storage.read(array), values)
    np.testing.assert_array_equal(storage.read_rows(array, slice(2, 4)), values[2:4])
    storage.write_rows(array, slice(2, 4), values[:2])
    np.testing.assert_array_equal(storage.read(array)[2:4], values[:2])
    np.testing.assert_array_equal(storage.read(array)[[0, 1, 4, 5]], values[[0, 1, 4, 5]])


# Injected faults.


def _all_to_one_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every head is written to the slot of the first."""
    real = TensorRtDecoder.targets

    def targets(self: Any, layer: int, heads: int, start: int) -> Any:
        return [(0, heads, next(iter(real(self, layer, heads, start)))[2])]

    monkeypatch.setattr(TensorRtDecoder, "targets", targets)


def _stale_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slots of the previous call are used."""
    real = runtime.ContextCalls.run

    def run(self: Any, inputs: Any, after: Any) -> Any:
        for array in self._downloads:
            array.host[...] = 0
        self._downloads = ()
        return real(self, inputs, after)

    monkeypatch.setattr(runtime.ContextCalls, "run", run)


def _no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    real = TensorRtDecoder.write_updates

    def write(self: Any, start: int, count: int) -> None:
        updates, self._updates = (
            self._updates,
            {n: a for n, a in self._updates.items() if not n.endswith("state")},
        )
        real(self, start, count)
        self._updates = updates

    monkeypatch.setattr(TensorRtDecoder, "write_updates", write)


def _slots_moved_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    real = DeviceStorage.move
    monkeypatch.setattr(
        DeviceStorage,
        "move",
        lambda self, array, moves: real(self, array, [m._replace(rows=1) for m in moves][:1]),
    )


@pytest.mark.parametrize("fault", [_all_to_one_slot, _stale_slots, _no_state, _slots_moved_wrongly])
def test_detects_injected_faults(
    fault: Callable[[pytest.MonkeyPatch], None],
    device: SimulatedDevice,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = random_decoder("gqa")
    bundle = with_engine(tmp_path / "b", decoder, BUDGET, "decomposed17")
    assert differences(opened(bundle, decoder), Reference(decoder, BUDGET)) < 1e-5
    fault(monkeypatch)
    assert not differences(opened(bundle, decoder), Reference(decoder, BUDGET)) < 1e-3
