"""The TensorRT runtime on a simulated device: outputs equal the reference, in place, no allocations."""

from __future__ import annotations

import gc
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.decoders import make_decoder
from support.quantized_decoders import quantize_decoder
from support.simulated_device import CHUNK, SimulatedDevice, add_engine, simulated_tensorrt
from support.tiny_bundles import byte_level_tokenizer, decoder_with_fewer_heads, exact_logits, write_bundle

from kvexport.bundle import GRAPH_FILE, Bundle
from kvexport.bundle.engine_record import read_record, write_record
from kvexport.errors import BundleError, CannotRunHere, UsageError
from kvexport.graph.lowering import lower
from kvexport.model.decoder import Decoder
from kvexport.runtime import Session, open_bundle
from kvexport.runtime.backends import tensorrt as runtime
from kvexport.runtime.backends.select import choose
from kvexport.runtime.backends.tensorrt import TensorRtDecoder

CAPACITY = 60
CLOSE = {"rtol": 0.0, "atol": 1e-4}
LOWERINGS = ("std24", "decomposed17")


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 67, count).tolist()


@pytest.fixture(scope="module")
def bundles(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A bundle of capacity 64 with an engine of capacity 60, by lowering; shared."""
    folder = tmp_path_factory.mktemp("engines")
    made: dict[str, Path] = {}

    def bundle(lowering: str) -> Path:
        if lowering not in made:
            made[lowering] = write_bundle(folder / lowering, decoder)
            add_engine(made[lowering], lowering=lowering, capacity=CAPACITY)
        return made[lowering]

    return bundle


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedDevice]:
    """A simulated GPU and TensorRT."""
    simulated = SimulatedDevice()
    monkeypatch.setattr("kvexport.runtime.backends.cuda.Cuda", lambda: simulated)
    monkeypatch.setitem(sys.modules, "tensorrt", simulated_tensorrt(simulated))
    yield simulated


@pytest.fixture(params=LOWERINGS)
def bundle(request: pytest.FixtureRequest, bundles: Callable[[str], Path]) -> Path:
    return bundles(request.param)


def _opened(bundle: Path) -> Session:
    return open_bundle(bundle, provider="tensorrt")


def _addresses(session: Session) -> list[int]:
    return [buffer.address for buffer in session.core.decoder.cache.buffers.values()]


def _engine_decoder(session: Session) -> TensorRtDecoder:
    assert isinstance(session.core.decoder, TensorRtDecoder)
    return session.core.decoder


def _wrong(session: Session, decoder: Decoder) -> float:
    """The largest difference from the reference's logits, over a prefill in chunks and ten steps."""
    ids = tokens(2 * CHUNK + 15)
    prompt, rest = ids[:-10], ids[-10:]
    measured = [session.prefill(prompt)[0], *(session.step([token])[0] for token in rest)]
    return float(np.abs(np.array(measured) - exact_logits(decoder, ids)[len(prompt) - 1 :]).max())


def test_prefill_and_steps_equal_the_oracle(bundle: Path, device: SimulatedDevice, decoder: Decoder) -> None:
    session = _opened(bundle)
    assert (session.provider, session.capacity) == ("tensorrt", CAPACITY)
    for _ in range(2):  # anew after a first text
        assert _wrong(session, decoder) < 1e-4


def test_score_equals_the_reference(bundle: Path, device: SimulatedDevice, decoder: Decoder) -> None:
    ids = tokens(CAPACITY)
    np.testing.assert_allclose(_opened(bundle).score([ids])[0], exact_logits(decoder, ids), **CLOSE)


def test_generated_text_equals_the_cpus(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, device: SimulatedDevice
) -> None:
    made = decoder_with_fewer_heads(
        tiny_checkpoint("llama", num_key_value_heads=4, vocab_size=320, eos_token_id=None)
    )
    bundle = write_bundle(tmp_path / "text", made, tokenizer=byte_level_tokenizer())
    add_engine(bundle)
    assert open_bundle(bundle).provider == "tensorrt"  # "auto" takes the engine
    alone = open_bundle(bundle, provider="cpu").generate("Once upon", max_new_tokens=20)
    assert open_bundle(bundle).generate("Once upon", max_new_tokens=20) == alone


def test_float16_caches(decoder: Decoder, tmp_path: Path, device: SimulatedDevice) -> None:
    for lowering in LOWERINGS:
        bundle = write_bundle(tmp_path / lowering, decoder, dtype="float16")
        add_engine(bundle, lowering=lowering)
        assert _wrong(_opened(bundle), decoder) < 0.05


def test_generation_ends_at_the_engines_capacity(bundle: Path, device: SimulatedDevice) -> None:
    session = _opened(bundle)
    made = session.generate(tokens(CAPACITY - 5), max_new_tokens=50, stop=[])
    assert made.finish_reason == "capacity" and len(made.token_ids) == 6
    with pytest.raises(UsageError, match=r"61 tokens[\s\S]*at most 60[\s\S]*engine again with --capacity 61"):
        session.prefill([1] * 61)
    with pytest.raises(UsageError, match="at most 60"):
        session.step([1])


def test_steps_replay_one_graph_and_allocate_nothing(bundle: Path, device: SimulatedDevice) -> None:
    session = _opened(bundle)
    session.prefill(tokens(5))
    session.step([1])  # not captured: TensorRT must run once before
    assert "launch" not in device.done
    allocations, addresses = device.allocations, _addresses(session)
    for _ in range(5):
        device.done.clear()
        session.step([2])
        writes = device.done.count("copy_rows")
        assert device.done == ["launch", *["upload"] * 4, "engine", "download", *["copy_rows"] * writes]
        assert writes == (0 if bundle.name == "std24" else 4)  # two a layer
    session.prefill(tokens(2 * CHUNK))
    session.step([2])
    assert (device.allocations, _addresses(session)) == (allocations, addresses)


def test_runs_without_graph_capture(bundle: Path, device: SimulatedDevice, decoder: Decoder) -> None:
    device.capturable = False
    assert _wrong(_opened(bundle), decoder) < 1e-4
    assert "launch" not in device.done


def test_caches_are_bound_at_one_address(device: SimulatedDevice, bundles: Callable[[str], Path]) -> None:
    made = _engine_decoder(_opened(bundles("std24")))
    for calls in (made.decode_calls, made.prefill_calls):
        for name, buffer in made.cache.buffers.items():
            bound = calls.context.addresses
            assert bound[name] == bound[name.replace("past_key_values", "present")] == buffer.address
    scratches = {calls.context.scratch for calls in (made.decode_calls, made.prefill_calls)}
    assert len(scratches) == 1 and (
        made.decode_calls.context.profile,
        made.prefill_calls.context.profile,
    ) == (0, 1)


def test_reports_memory_of_engine_and_driver(bundle: Path, device: SimulatedDevice) -> None:
    session = _opened(bundle)
    memory = session.memory()
    per_token = 4 * (4 * 16 + 2 * (12 + 16))
    assert memory.capacity == memory.capacity_limit == CAPACITY  # allocated from the start
    assert memory.bytes_allocated == memory.bytes_limit == CAPACITY * per_token
    actual = memory.device
    assert actual is not None and actual.name == "Simulated"
    assert (actual.weights, actual.loaded, actual.activations, actual.kv) == (
        4096,
        4096,
        5000,
        CAPACITY * per_token,
    )
    assert actual.free == actual.total - device.used and device.used > 4096 + 5000 + actual.kv


def test_rejects_more_than_one_sequence(bundle: Path, device: SimulatedDevice) -> None:
    session = _opened(bundle)
    session.prefill([1, 2])
    with pytest.raises(
        UsageError, match=r"the number of sequences must be 1[\s\S]*got:      2[\s\S]*expected: 1"
    ):
        session.prefill([[1], [2]])


def test_clears_nan_of_the_previous_text(bundle: Path, device: SimulatedDevice) -> None:
    session = _opened(bundle)
    sound = session.prefill([1, 2, 3])
    for buffer in session.core.decoder.cache.buffers.values():
        device.at(buffer.address, buffer.nbytes)[...] = 0xFF
    assert np.isnan(session.step([1])).all()
    np.testing.assert_array_equal(session.prefill([1, 2, 3]), sound)


# Injected faults, which real libraries do not report.


def _not_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output caches have addresses of their own."""
    real = runtime.ContextCalls.__init__

    def elsewhere(
        self: Any,
        context: Any,
        storage: Any,
        log: Any,
        vocab: int,
        bound: dict[str, int],
        report: Any,
        **options: Any,
    ) -> None:
        apart = {
            name: storage.device.allocate(1 << 16) if "present" in name else address
            for name, address in bound.items()
        }
        real(self, context, storage, log, vocab, apart, report, **options)

    monkeypatch.setattr(runtime.ContextCalls, "__init__", elsewhere)


def _no_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorRtDecoder, "write_updates", lambda *arguments: None)


def _one_slot_late(monkeypatch: pytest.MonkeyPatch) -> None:
    real = TensorRtDecoder.write_updates
    monkeypatch.setattr(
        TensorRtDecoder, "write_updates", lambda self, start, count: real(self, start + 1, count)
    )


def _one_head_less(monkeypatch: pytest.MonkeyPatch) -> None:
    real = SimulatedDevice.copy_rows

    def copy(
        self: SimulatedDevice,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        rows: int,
    ) -> None:
        real(self, target, target_pitch, source, source_pitch, width, rows - 1)

    monkeypatch.setattr(SimulatedDevice, "copy_rows", copy)


def _stale_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replayed step leaves out an upload."""
    real = SimulatedDevice.launch

    def launch(self: SimulatedDevice, graph: Any) -> None:
        real(self, [graph[0], *graph[2:]])

    monkeypatch.setattr(SimulatedDevice, "launch", launch)


@pytest.mark.parametrize(
    ("lowering", "fault"),
    [
        ("std24", _not_in_place),
        ("std24", _stale_positions),
        ("decomposed17", _no_writes),
        ("decomposed17", _one_slot_late),
        ("decomposed17", _one_head_less),
        ("decomposed17", _stale_positions),
    ],
)
def test_detects_injected_faults(
    lowering: str,
    fault: Callable[[pytest.MonkeyPatch], None],
    bundles: Callable[[str], Path],
    device: SimulatedDevice,
    decoder: Decoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    assert _wrong(_opened(bundles(lowering)), decoder) > 1e-2


def test_rejects_a_size_outside_the_profile(
    bundle: Path, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = _opened(bundle)
    made = _engine_decoder(session)
    made.prefill_calls = made.decode_calls
    with pytest.raises(CannotRunHere, match="rejects 5 as a size of input_ids"):
        session.prefill(tokens(5))


def test_rejects_writes_beyond_the_cache(
    bundle: Path, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder checks the bound itself, independently of the session."""
    made = _engine_decoder(_opened(bundle))
    beyond = np.arange(CAPACITY - 1, CAPACITY + 1)[None]
    with pytest.raises(UsageError, match="61 tokens"):
        made.run(np.ones((1, 2), np.int64), beyond, np.array([[1]]))
    monkeypatch.setattr(made.cache, "reserve", lambda tokens: None)
    with pytest.raises(AssertionError, match="beyond the cache"):
        made.run(np.ones((1, 2), np.int64), beyond, np.array([[1]]))


def test_detects_a_late_synchronisation(bundle: Path, device: SimulatedDevice, decoder: Decoder) -> None:
    """Control of the simulation: logits that are read before synchronising are wrong."""
    session = _opened(bundle)
    made = _engine_decoder(session)
    device.synchronize()
    real, device.synchronize = device.synchronize, lambda: None  # type: ignore[method-assign]
    made.decode_calls.captures = False
    early = made.run(np.array([[1]]), np.array([[0]]), np.array([[0]])).copy()
    real()
    assert np.isnan(early).all() and np.isfinite(made.decode_calls.host_logits()).all()


def test_rtx_compiles_the_decode_step_before_it_is_captured(bundle: Path, device: SimulatedDevice) -> None:
    module = sys.modules["tensorrt"]
    for strategies, expected in ((None, "LAZY"), (SimpleNamespace(EAGER="EAGER"), "EAGER")):
        if strategies is not None:
            module.DynamicShapesKernelSpecializationStrategy = strategies  # type: ignore[attr-defined]
        made = _engine_decoder(_opened(bundle))
        actual = [
            calls.context.config.dynamic_shapes_kernel_specialization_strategy
            for calls in (made.decode_calls, made.prefill_calls)
        ]
        assert actual == [expected, "LAZY"]


def test_the_log_outlives_the_decoder_that_came_first(bundle: Path, device: SimulatedDevice) -> None:
    """TensorRT keeps calling the first log while a later runtime exists."""
    first = _opened(bundle)
    log = weakref.ref(_engine_decoder(first)._log)
    second = _opened(bundle)
    del first
    gc.collect()
    assert log() is _engine_decoder(second)._log


# Choice of the engine.


def test_names_every_engine_that_does_not_run_here(
    decoder: Decoder, tmp_path: Path, device: SimulatedDevice
) -> None:
    bundle = write_bundle(tmp_path / "b", decoder)
    with pytest.raises(
        CannotRunHere, match=r"must have an engine that this machine can run[\s\S]*kvexport engine"
    ):
        _opened(bundle)
    add_engine(bundle, target="a", compute_capability=("8.9", "12.0"))
    add_engine(bundle, target="b", version="10.3.0")
    add_engine(bundle, target="c", engine="tensorrt-rtx", version="0.1")
    add_engine(bundle, target="d", batch=2)
    with pytest.raises(CannotRunHere) as refused:
        _opened(bundle)
    message = str(refused.value)
    assert "a was built for compute capability 8.9 or 12.0, and Simulated has 8.7" in message
    assert "b was built with tensorrt 10.3.0, here is 10.16.2" in message
    assert "c was built with tensorrt-rtx 0.1, here is" in message or "c needs tensorrt-rtx 0.1" in message
    assert "d was built for 2 sequences" in message
    assert open_bundle(bundle).provider == "cpu"  # "auto" goes on
    add_engine(bundle, target="e")
    assert _opened(bundle).provider == "tensorrt"


def test_version_compatible_and_hardware_compatible_plans(
    decoder: Decoder, tmp_path: Path, device: SimulatedDevice
) -> None:
    bundle = write_bundle(tmp_path / "b", decoder)
    folder = add_engine(bundle, version="10.3.0", options={"version_compatible": True})
    assert _opened(bundle).provider == "tensorrt"
    assert open_bundle(bundle).provider == "cpu"  # holds code for the host: only when asked for by name
    shutil.rmtree(folder)
    add_engine(bundle, version="11.0.0", target="later", options={"version_compatible": True})
    with pytest.raises(CannotRunHere, match=r"11\.0\.0"):
        _opened(bundle)
    add_engine(bundle, target="wide", compute_capability=("8.6",), options={"hardware_compatible": True})
    assert _opened(bundle).provider == "tensorrt"


def test_rejects_an_engine_of_another_bundle(
    decoder: Decoder, tmp_path: Path, device: SimulatedDevice
) -> None:
    bundle = write_bundle(tmp_path / "b", decoder)
    add_engine(bundle, manifest_sha256="0" * 64)
    for provider in ("tensorrt", "auto"):
        with pytest.raises(BundleError, match=r"must be built from this bundle[\s\S]*kvexport engine"):
            open_bundle(bundle, provider=provider)
    assert open_bundle(bundle, provider="cpu").provider == "cpu"


def test_rejects_damaged_plans(decoder: Decoder, tmp_path: Path, device: SimulatedDevice) -> None:
    bundle = write_bundle(tmp_path / "b", decoder)
    plan = add_engine(bundle) / "decoder.plan"
    whole = plan.read_bytes()
    plan.write_bytes(whole.replace(b"{", b"[", 1))
    with pytest.raises(BundleError, match="its sha256 differs"):
        _opened(bundle)
    with pytest.raises(CannotRunHere, match=r"cannot load[\s\S]*magic tag"):
        open_bundle(bundle, provider="tensorrt", verify=False)
    plan.write_bytes(whole[:-1])
    with pytest.raises(BundleError, match="must have the size in build"):
        open_bundle(bundle, provider="tensorrt", verify=False)


def test_hashes_weights_only_if_they_are_read(
    decoder: Decoder, tmp_path: Path, device: SimulatedDevice
) -> None:
    bundle = write_bundle(tmp_path / "b", decoder)
    add_engine(bundle)
    data = bundle / "decoder.onnx.data"
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    assert _opened(bundle).provider == "tensorrt"
    with pytest.raises(BundleError, match="its sha256 differs"):
        open_bundle(bundle, provider="cpu")


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_refits_an_engine_without_weights(
    lowering: str, decoder: Decoder, tmp_path: Path, device: SimulatedDevice
) -> None:
    bundle = write_bundle(tmp_path / "b", decoder)
    add_engine(bundle, lowering=lowering, options={"refit": True})
    assert _wrong(_opened(bundle), decoder) < 1e-4
    data = bundle / "decoder.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(BundleError, match="its sha256 differs"):  # since it is read
        _opened(bundle)
    data.write_bytes(whole)
    other = write_bundle(tmp_path / "other", decoder)
    add_engine(other, lowering=lowering, options={"refit": True}, graph=bundle / "decoder.onnx")
    with pytest.raises(CannotRunHere, match="cannot put the bundle's weights"):
        _opened(other)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_refits_integer_weights(
    weights: str, lowering: str, tmp_path: Path, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    float_decoder = make_decoder("gqa", hidden=64, heads=4, head_dim=16, vocab=68, dtype=torch.float32)
    quantized = quantize_decoder(float_decoder, weights)
    bundle = write_bundle(tmp_path / "b", quantized)
    add_engine(bundle, lowering=lowering, options={"refit": True})
    whole = write_bundle(tmp_path / "whole", quantized)
    add_engine(whole, lowering=lowering)
    ids = tokens(CAPACITY)
    np.testing.assert_array_equal(_opened(bundle).score([ids])[0], _opened(whole).score([ids])[0])
    other = write_bundle(tmp_path / "other", quantize_decoder(float_decoder, "int4", block=64))
    monkeypatch.setattr("kvexport.graph.lowering.lower", lambda path, name: lower(other / GRAPH_FILE, name))
    with pytest.raises(CannotRunHere, match="cannot put the bundle's weights"):  # scales of another shape
        _opened(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"capacity": 50}, r"past_key_values\.\d\.(key|value)"),  # the plan's is 64
        ({"lowering": "decomposed17"}, "inputs and outputs of its lowering"),
    ],
)
def test_rejects_an_engine_that_contradicts_its_record(
    change: dict[str, Any], message: str, decoder: Decoder, tmp_path: Path, device: SimulatedDevice
) -> None:
    bundle = write_bundle(tmp_path / "b", decoder)
    folder = add_engine(bundle)
    record = read_record(folder)
    write_record(folder, type(record)(**{**vars(record), **change}))
    with pytest.raises(BundleError, match=message):
        _opened(bundle)


def test_rejects_an_engine_that_does_not_write_in_place(
    bundles: Callable[[str], Path], device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("support.simulated_device.SimulatedEngine._aliased", lambda self, name: None)
    with pytest.raises(BundleError, match="must write the cache in place"):
        _opened(bundles("std24"))
    monkeypatch.setitem(sys.modules, "tensorrt", simulated_tensorrt(device, aliasing=False))
    assert _opened(bundles("std24")).provider == "tensorrt"  # older versions cannot be asked


def test_not_enough_device_memory(bundle: Path, device: SimulatedDevice) -> None:
    device.total = 10_000
    with pytest.raises(CannotRunHere, match=r"not enough (device )?memory"):
        _opened(bundle)


def test_releases_memory_at_once(bundle: Path, device: SimulatedDevice) -> None:
    session = _opened(bundle)
    session.score([tokens(20)])
    held = device.used
    del session  # nothing waits for the collector of cycles
    assert device.used == 4096 < held  # the simulated engine's own


def test_results_do_not_depend_on_unwritten_slots(
    bundle: Path, device: SimulatedDevice, decoder: Decoder
) -> None:
    opened = Bundle.open(bundle)
    chosen = choose(opened, "tensorrt")
    assert chosen.engine is not None
    made = TensorRtDecoder(opened, chosen.engine, device, fill=100.0)
    key, value = made.cache.layer_in_float32(0)
    assert (key == 100).all() and (value == 100).all()
    ids = tokens(6)
    got = made.run(np.array([ids]), np.arange(6)[None], np.arange(6)[None])[0]
    np.testing.assert_allclose(got, exact_logits(decoder, ids), **CLOSE)
    key, _ = made.cache.layer_in_float32(0)
    assert (key[:, :, 6:] == 100).all() and not (key[:, :, :6] == 100).any()
