"""ONNX Runtime with a cache on a simulated device: outputs equal the CPU, no copies, no allocations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from support.simulated_device import SimulatedDevice, onnxruntime_on
from support.tiny_bundles import exact_logits, write_bundle

from kvexport.bundle import Bundle
from kvexport.devices.gpu import find_gpu
from kvexport.errors import CannotRunHere
from kvexport.model.decoder import Decoder
from kvexport.runtime import Session, open_bundle
from kvexport.runtime.backends.base import TOKEN_INPUTS
from kvexport.runtime.backends.ort_session import graph_file, session_on, session_options
from kvexport.runtime.cache.device_arrays import DeviceStorage, as_float32, from_float, stored_as
from kvexport.runtime.cache.kv_cache import KvCache

CLOSE = {"rtol": 0.0, "atol": 1e-4}


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 67, count).tolist()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimulatedDevice:
    simulated = SimulatedDevice()
    onnxruntime_on(simulated, monkeypatch)
    monkeypatch.setattr("kvexport.runtime.backends.select._DEVICE_STEP", 16)
    return simulated


@pytest.fixture(scope="module")
def half(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 bundle, which has a graph lowered for CUDA, with GroupQueryAttention in its first layer."""
    bundle = write_bundle(tmp_path_factory.mktemp("half") / "half", decoder, dtype="float16", capacity=600)
    assert graph_file(Bundle.open(bundle), "cuda") == "decoder.cuda.onnx"
    assert b"GroupQueryAttention" in (bundle / "decoder.cuda.onnx").read_bytes()
    return bundle


def _wrong(session: Session, decoder: Decoder) -> float:
    """The largest difference of logits from the reference's, over a chunked prefill and forty steps."""
    ids = tokens(90)
    prompt, rest = ids[:50], ids[50:]
    measured = [session.prefill(prompt)[0], *(session.step([token])[0] for token in rest)]
    return float(np.abs(np.array(measured) - exact_logits(decoder, ids)[len(prompt) - 1 :]).max())


def test_prefill_and_steps_equal_the_reference_while_the_cache_grows(
    tiny_bundle: Path, half: Path, device: SimulatedDevice, decoder: Decoder
) -> None:
    for bundle, bound in ((tiny_bundle, 1e-4), (half, 0.05)):
        session = open_bundle(bundle, provider="cuda", chunk=16)
        assert session.provider == "cuda" and open_bundle(bundle).provider == "cuda"  # "auto" takes it
        assert _wrong(session, decoder) < bound
        assert session.memory().capacity == 96
    assert "copy_rows" in device.done


def test_rebinds_inputs_that_are_copied_when_bound(
    tiny_bundle: Path, half: Path, device: SimulatedDevice, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime copies inputs that an operator needs in other memory."""
    real = onnxruntime.IOBinding.bind_input
    copies: list[np.ndarray] = []

    def bind_input(
        self: onnxruntime.IOBinding,
        name: str,
        kind: str,
        number: int,
        dtype: int,
        shape: tuple[int, ...],
        address: int,
    ) -> None:
        if name in TOKEN_INPUTS:
            copies.append(device.at(address, 8 * int(np.prod(shape))).copy())
            address = copies[-1].ctypes.data
        real(self, name, kind, number, dtype, shape, address)

    monkeypatch.setattr(onnxruntime.IOBinding, "bind_input", bind_input)
    for bundle, bound in ((tiny_bundle, 1e-4), (half, 0.05)):
        assert _wrong(open_bundle(bundle, provider="cuda", chunk=16), decoder) < bound


@pytest.mark.parametrize("fault", ["no copy of slots", "no wait"])
def test_detects_injected_faults(
    fault: str, tiny_bundle: Path, device: SimulatedDevice, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "no copy of slots":
        monkeypatch.setattr(SimulatedDevice, "copy_rows", lambda *arguments: None)
    else:
        monkeypatch.setattr(DeviceStorage, "synchronize", lambda self: None)
    try:
        difference = _wrong(open_bundle(tiny_bundle, provider="cuda", chunk=16), decoder)
    except RuntimeError as error:  # positions that were never written
        difference = np.inf if "TensorScatter" in str(error) or "Gather" in str(error) else 0.0
    assert not difference < 1e-2


def test_batches_and_scores(tiny_bundle: Path, half: Path, device: SimulatedDevice) -> None:
    prompts = [tokens(length, seed=length) for length in (1, 13, 8, 40, 5)]
    for bundle, bound in ((tiny_bundle, 1e-4), (half, 0.02)):
        session, alone = open_bundle(bundle, provider="cuda", chunk=16), open_bundle(bundle, provider="cpu")
        prefilled, stepped = session.prefill(prompts), session.step([3] * 5)
        for row, prompt in enumerate(prompts):
            np.testing.assert_allclose(prefilled[row], alone.prefill(prompt)[0], atol=bound)
            np.testing.assert_allclose(stepped[row], alone.step([3])[0], atol=bound)
        windows = [tokens(20, seed=1), tokens(20, seed=2)]
        np.testing.assert_allclose(session.score(windows), alone.score(windows), atol=bound)


def test_a_step_allocates_nothing_and_moves_no_cache(half: Path, device: SimulatedDevice) -> None:
    session = open_bundle(half, provider="cuda")
    session.prefill(tokens(5))
    session.step([1])
    allocations = device.allocations
    addresses = [buffer.address for buffer in session.core.decoder.cache.buffers.values()]
    device.done.clear()
    for _ in range(5):
        session.step([2])
    assert device.allocations == allocations
    assert [buffer.address for buffer in session.core.decoder.cache.buffers.values()] == addresses
    assert device.done == [*["upload"] * 4, "download"] * 5


def test_reports_device_memory(tiny_bundle: Path, device: SimulatedDevice) -> None:
    session = open_bundle(tiny_bundle, provider="cuda")
    session.prefill([tokens(3), tokens(20)])
    memory = session.memory()
    actual = memory.device
    assert actual is not None and (actual.name, actual.weights, actual.activations) == (
        "Simulated",
        None,
        None,
    )
    assert actual.kv == memory.bytes_allocated == 2 * 32 * 4 * (4 * 16 + 2 * (12 + 16))
    assert actual.free == actual.total - device.used and device.used >= actual.kv
    held = device.used
    session.reset()
    assert device.used <= held - actual.kv  # at once
    assert open_bundle(tiny_bundle, provider="cpu").memory().device is None


def test_not_enough_device_memory(tiny_bundle: Path, device: SimulatedDevice) -> None:
    session = open_bundle(tiny_bundle, provider="cuda")
    session.prefill(tokens(16))
    before = session.step([1])
    session.prefill(tokens(16))
    device.total = device.used + 1000
    with pytest.raises(CannotRunHere, match="not enough memory for the KV cache"):
        session.step([1])
    device.total = 1 << 30
    np.testing.assert_array_equal(session.step([1]), before)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_cuda_does_not_fall_back_to_the_cpu(tiny_bundle: Path) -> None:
    if find_gpu() is not None:
        pytest.skip("there is a GPU")
    with pytest.raises(CannotRunHere, match=r"could not start on the GPU[\s\S]*CPUExecutionProvider only"):
        session_on("cuda", str(tiny_bundle / "decoder.onnx"), session_options(1))


def test_stores_bfloat16_as_bits() -> None:
    import ml_dtypes

    values = np.array([0.0, 1.5, -3.25, 100.0, 1e-30, np.inf], np.float32)
    bits = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    assert stored_as("bfloat16") == np.uint16
    np.testing.assert_array_equal(
        as_float32(bits, "bfloat16"), values.astype(ml_dtypes.bfloat16).astype(np.float32)
    )
    assert from_float(100.0, "bfloat16") == bits[3]
    copy = as_float32(values, "float32")
    copy[0] = 1
    assert values[0] == 0


def test_bfloat16_cache_on_a_device(decoder: Decoder, tmp_path: Path, device: SimulatedDevice) -> None:
    bundle = Bundle.open(write_bundle(tmp_path / "b", decoder, dtype="bfloat16"))
    cache = KvCache(bundle, 1, "bfloat16", fill=100.0, step=8, storage=DeviceStorage(device))
    cache.reserve(8)
    storage = cache.storage
    assert isinstance(storage, DeviceStorage)
    key = cache.buffers["past_key_values.1.key"]
    assert key.shape == (1, 2, 8, 12) and key.nbytes == 2 * 8 * 12 * 2
    written = np.arange(2 * 8 * 12, dtype=np.uint16).reshape(key.shape)
    storage.write(key, written)
    cache.reserve(9)
    grown, value = cache.layer(1)
    np.testing.assert_array_equal(grown[:, :, :8], written)
    assert (as_float32(grown[:, :, 8:], "bfloat16") == 100).all()
    assert (cache.layer_in_float32(1)[1] == 100).all() and value.shape == (1, 2, 16, 16)
    assert cache.bytes(16) == sum(buffer.nbytes for buffer in cache.buffers.values())


def test_runs_rows_one_by_one_without_padding(tiny_bundle: Path) -> None:
    """GroupQueryAttention takes several tokens in a batch only without a past; padding is not run."""
    session = open_bundle(tiny_bundle, provider="cpu", chunk=4)
    prompts = [tokens(3), tokens(8, seed=1)]
    prefilled = session.prefill(prompts)
    key, _ = session.core.decoder.cache.layer(0)
    assert (key[0, :, 3:] == 0).all() and (key[0, :, :3] != 0).any(axis=-1).all()
    assert (key[1, :, 8:] == 0).all() and (key[1, :, :8] != 0).any(axis=-1).all()
    session.core.decoder.row_by_row = False  # type: ignore[attr-defined]
    with pytest.raises(Exception, match="batch_size must be 1"):
        session.prefill(prompts)
    assert np.isfinite(prefilled).all()
