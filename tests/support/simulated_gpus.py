"""Simulate the libraries of NVIDIA's driver, CUDA and NVML, as `kvexport.devices.gpu` loads them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

_ERROR = 999  # CUDA_ERROR_UNKNOWN and NVML_ERROR_UNKNOWN
_NOT_SUPPORTED = 3  # NVML_ERROR_NOT_SUPPORTED


@dataclass(frozen=True)
class SimulatedGpu:
    """One GPU of the simulated driver. NVML answers "not supported" for every reading that is None.

    `memory_used` is in MiB; successive reads return its successive values, then the last one.
    """

    name: str = "NVIDIA GeForce RTX 4090"
    compute_capability: str = "8.9"
    memory: int = 24564 * 2**20
    unified: bool = False
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    temperature_c: int | None = None
    power_mw: int | None = None
    power_limit_mw: int | None = None
    memory_used: tuple[int, ...] = ()


def simulate_gpus(
    monkeypatch: pytest.MonkeyPatch, *gpus: SimulatedGpu, driver: str = "580.82", failing: Sequence[str] = ()
) -> None:
    """Let this process have `gpus` and no others; the functions named in `failing` return an error.

    Without any GPU there is no driver either, unless a function is to fail.
    """
    real = ctypes.CDLL
    libraries: dict[str, Any] = {
        "libcuda.so.1": _Library(_cuda(gpus), failing),
        "libnvidia-ml.so.1": _Library(_nvml(gpus, driver), failing),
    }

    def load(name: Any, *arguments: Any, **options: Any) -> Any:
        if name not in libraries:
            return real(name, *arguments, **options)
        if not gpus and not failing:
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")
        return libraries[name]

    monkeypatch.setattr(ctypes, "CDLL", load)


class _Library:
    def __init__(self, functions: dict[str, Callable[..., int]], failing: Sequence[str]) -> None:
        self._functions, self._failing = functions, failing

    def __getattr__(self, name: str) -> Callable[..., int]:
        return (lambda *arguments: _ERROR) if name in self._failing else self._functions[name]


def _set(reference: Any, value: int | None) -> int:
    """Write through a `ctypes.byref`."""
    if value is None:
        return _NOT_SUPPORTED
    reference._obj.value = value
    return 0


def _write(buffer: Any, text: str) -> int:
    buffer.value = text.encode()
    return 0


def _cuda(gpus: Sequence[SimulatedGpu]) -> dict[str, Callable[..., int]]:
    def attribute(reference: Any, number: int, device: Any) -> int:
        gpu = gpus[device.value]
        major, minor = map(int, gpu.compute_capability.split("."))
        return _set(reference, {75: major, 76: minor, 18: int(gpu.unified)}[number])

    return {
        "cuInit": lambda flags: 0,
        "cuDeviceGetCount": lambda reference: _set(reference, len(gpus)),
        "cuDeviceGet": lambda reference, index: _set(reference, index),
        "cuDeviceGetName": lambda buffer, length, device: _write(buffer, gpus[device.value].name),
        "cuDeviceTotalMem_v2": lambda reference, device: _set(reference, gpus[device.value].memory),
        "cuDeviceGetAttribute": attribute,
    }


def _nvml(gpus: Sequence[SimulatedGpu], driver: str) -> dict[str, Callable[..., int]]:
    """NVML's handle of a GPU is its index, plus one so that it is not a null pointer."""
    reads = dict.fromkeys(range(len(gpus)), 0)

    def of(handle: Any) -> SimulatedGpu:
        return gpus[handle.value - 1]

    def clock(handle: Any, kind: int, reference: Any) -> int:
        return _set(reference, {1: of(handle).sm_clock_mhz, 2: of(handle).memory_clock_mhz}[kind])

    def temperature(handle: Any, sensor: int, reference: Any) -> int:
        assert sensor == 0
        return _set(reference, of(handle).temperature_c)

    def memory(handle: Any, reference: Any) -> int:
        used, index = of(handle).memory_used, handle.value - 1
        if not used:
            return _NOT_SUPPORTED
        reference._obj.used = used[min(reads[index], len(used) - 1)] * 2**20
        reads[index] += 1
        return 0

    return {
        "nvmlInit_v2": lambda: 0,
        "nvmlShutdown": lambda: 0,
        "nvmlSystemGetDriverVersion": lambda buffer, length: _write(buffer, driver),
        "nvmlDeviceGetCount_v2": lambda reference: _set(reference, len(gpus)),
        "nvmlDeviceGetHandleByIndex_v2": lambda index, reference: _set(reference, index + 1),
        "nvmlDeviceGetName": lambda handle, buffer, length: _write(buffer, of(handle).name),
        "nvmlDeviceGetClockInfo": clock,
        "nvmlDeviceGetTemperature": temperature,
        "nvmlDeviceGetPowerUsage": lambda handle, reference: _set(reference, of(handle).power_mw),
        "nvmlDeviceGetEnforcedPowerLimit": lambda handle, reference: _set(
            reference, of(handle).power_limit_mw
        ),
        "nvmlDeviceGetMemoryInfo": memory,
    }
