"""Provider "auto": the reason for using a worse provider than expected is logged, and nothing else is."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.simulated_device import SimulatedDevice, add_engine, only_gpu

from kvexport.bundle import Bundle
from kvexport.devices.gpu import Gpu
from kvexport.errors import CannotRunHere
from kvexport.runtime import open_bundle
from kvexport.runtime.backends.select import choose, warn_once

ENGINE_UNUSABLE = "the bundle's TensorRT engine cannot be used: there is no NVIDIA driver"
GPU_UNUSABLE = "Test GPU cannot be used: ONNX Runtime must be built with CUDA"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The log of the test, as of a new process."""
    warn_once.cache_clear()
    yield caplog
    warn_once.cache_clear()


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture
def with_engine(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    """A copy of the bundle with an engine for compute capability 8.7."""
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    add_engine(path)
    return Bundle.open(path)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, whose ONNX Runtime has no CUDA."""

    def no_driver() -> None:
        raise CannotRunHere("there is no NVIDIA driver on this machine")

    monkeypatch.setattr("kvexport.runtime.backends.cuda.Cuda", no_driver)
    monkeypatch.setattr("kvexport.runtime.backends.ort_session.CUDA", "TestExecutionProvider")
    monkeypatch.setattr("kvexport.runtime.backends.select.find_gpu", lambda: None)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that ONNX Runtime cannot use."""
    monkeypatch.setattr(
        "kvexport.runtime.backends.select.find_gpu", lambda: Gpu("Test GPU", "8.7", 1 << 30, False)
    )


def test_says_nothing_without_gpu_and_engine(bundle: Bundle, log: pytest.LogCaptureFixture) -> None:
    assert choose(bundle, "auto").name == "cpu" and log.records == []


def test_names_the_reason_if_a_gpu_is_not_used(
    bundle: Bundle, gpu: None, log: pytest.LogCaptureFixture
) -> None:
    assert choose(bundle, "auto").name == "cpu"
    (record,) = log.records
    assert record.name == "kvexport.runtime" and record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"provider auto: using cpu: {GPU_UNUSABLE}")
    assert "CPUExecutionProvider" in record.getMessage()


def test_names_the_reason_if_an_engine_is_not_used(
    with_engine: Bundle, log: pytest.LogCaptureFixture
) -> None:
    assert choose(with_engine, "auto").name == "cpu"
    (record,) = log.records
    assert record.getMessage().startswith(f"provider auto: using cpu: {ENGINE_UNUSABLE}")


def test_names_both_reasons_in_one_record(
    with_engine: Bundle, gpu: None, log: pytest.LogCaptureFixture
) -> None:
    assert choose(with_engine, "auto").name == "cpu"
    (record,) = log.records
    assert ENGINE_UNUSABLE in record.getMessage() and GPU_UNUSABLE in record.getMessage()


def test_names_the_reason_if_cuda_is_used_in_place_of_an_engine(
    with_engine: Bundle, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_gpu(monkeypatch)
    monkeypatch.setattr(
        "kvexport.runtime.backends.cuda.Cuda", lambda: SimulatedDevice(compute_capability="7.5")
    )
    assert choose(with_engine, "auto").name == "cuda"
    (record,) = log.records
    assert record.getMessage().startswith("provider auto: using cuda: the bundle's TensorRT engine cannot")
    assert "7.5" in record.getMessage()


def test_says_nothing_if_the_engine_or_cuda_is_used(
    bundle: Bundle,
    with_engine: Bundle,
    gpu: None,
    log: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only_gpu(monkeypatch)
    assert choose(with_engine, "auto").name == "tensorrt" and choose(bundle, "auto").name == "cuda"
    assert log.records == []


def test_says_nothing_if_the_cpu_is_requested(
    with_engine: Bundle, gpu: None, log: pytest.LogCaptureFixture
) -> None:
    assert choose(with_engine, "cpu").name == "cpu" and log.records == []


def test_says_it_once(bundle: Bundle, gpu: None, log: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        with open_bundle(bundle.path, threads=1) as session:
            assert session.provider == "cpu"
    assert len(log.records) == 1


def test_prints_nothing_unless_the_application_handles_the_logger() -> None:
    """Without a handler, Python would print warnings to standard error."""
    assert any(isinstance(each, logging.NullHandler) for each in logging.getLogger("kvexport").handlers)
