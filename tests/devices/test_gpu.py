"""`kvexport.devices.gpu`: GPUs by the CUDA driver and by NVML, both simulated."""

from __future__ import annotations

import pytest
from support.simulated_gpus import SimulatedGpu, simulate_gpus

from kvexport.devices.gpu import Gpu, GpuReading, find_gpu, find_gpus, memory_reader, read_gpus

DESKTOP = SimulatedGpu(
    sm_clock_mhz=2520,
    memory_clock_mhz=10501,
    temperature_c=61,
    power_mw=215500,
    power_limit_mw=450000,
    memory_used=(100, 900, 300),
)
JETSON = SimulatedGpu(name="Orin", compute_capability="8.7", memory=7620504 * 1024, unified=True)


def test_describes_each_gpu_by_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_gpus(monkeypatch, DESKTOP, JETSON, driver="580.82.07")
    assert find_gpus() == (
        Gpu("NVIDIA GeForce RTX 4090", "8.9", 24564 * 2**20, unified=False, driver="580.82.07"),
        Gpu("Orin", "8.7", 7620504 * 1024, unified=True, driver="580.82.07"),
    )
    assert find_gpu() == find_gpus()[0]


def test_finds_no_gpu_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_gpus(monkeypatch)
    assert (find_gpus(), find_gpu(), read_gpus()) == ((), None, [])
    with memory_reader() as used:
        assert used() is None


@pytest.mark.parametrize(
    "failing", ["cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceTotalMem_v2"]
)
def test_finds_no_gpu_if_the_driver_fails(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    simulate_gpus(monkeypatch, DESKTOP, failing=[failing])
    assert find_gpus() == () and find_gpu() is None


@pytest.mark.parametrize("failing", ["nvmlInit_v2", "nvmlSystemGetDriverVersion"])
def test_the_driver_version_is_none_if_nvml_does_not_report_it(
    monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    simulate_gpus(monkeypatch, DESKTOP, failing=[failing])
    gpu = find_gpu()
    assert gpu is not None and gpu.driver is None


def test_reads_what_each_gpu_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_gpus(monkeypatch, DESKTOP, JETSON)
    assert read_gpus() == [
        GpuReading("NVIDIA GeForce RTX 4090", 2520, 10501, 61, 215.5, 450.0),
        GpuReading("Orin", None, None, None, None, None),
    ]


@pytest.mark.parametrize("failing", ["nvmlInit_v2", "nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2"])
def test_reads_nothing_if_nvml_lists_no_gpu(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    simulate_gpus(monkeypatch, DESKTOP, failing=[failing])
    assert read_gpus() == []
    with memory_reader() as used:
        assert used() is None


def test_reads_the_memory_in_use_on_the_first_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_gpus(monkeypatch, DESKTOP, JETSON)
    with memory_reader() as used:
        assert [used() for _ in range(3)] == [100 * 2**20, 900 * 2**20, 300 * 2**20]
    simulate_gpus(monkeypatch, JETSON, DESKTOP)
    with memory_reader() as used:
        assert used() is None
