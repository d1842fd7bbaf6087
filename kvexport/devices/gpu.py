"""Probe NVIDIA GPUs: identity by the CUDA driver; clocks, power, temperature and memory in use by NVML.

Both libraries come with the driver and are called through ctypes, so that no package is needed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_CUDA, _NVML = "libcuda.so.1", "libnvidia-ml.so.1"
_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18  # CUdevice_attribute
_SM_CLOCK, _MEMORY_CLOCK = 1, 2  # nvmlClockType_t
_GPU_TEMPERATURE = 0  # nvmlTemperatureSensors_t
_NAME_LENGTH = 256


@dataclass(frozen=True)
class Gpu:
    """A GPU that CUDA can use.

    Attributes:
        name: the driver's name of it, such as "NVIDIA GeForce RTX 4090".
        compute_capability: such as "8.7".
        memory: total memory in bytes.
        unified: whether it shares the host's memory.
        driver: version of the driver, such as "580.82.07"; None if NVML does not report it.
    """

    name: str
    compute_capability: str
    memory: int
    unified: bool
    driver: str | None = None


@dataclass(frozen=True)
class GpuReading:
    """Name, clocks, temperature and power of a GPU. A value that the GPU does not report is None.

    The field names are keys of the JSON that `kvexport bench` writes.
    """

    name: str | None
    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    temperature_c: int | None
    power_w: float | None
    power_limit_w: float | None


def find_gpus() -> tuple[Gpu, ...]:
    """The GPUs that CUDA can use, in CUDA's order; empty without a driver or a GPU."""
    cuda, count = _load(_CUDA), ctypes.c_int()
    if cuda is None or cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    driver = _driver_version()
    gpus = (_describe(cuda, index, driver) for index in range(count.value))
    return tuple(gpu for gpu in gpus if gpu is not None)


def find_gpu() -> Gpu | None:
    """The first GPU that CUDA can use; None without a driver or a GPU."""
    return next(iter(find_gpus()), None)


def read_gpus() -> list[GpuReading]:
    """Current clocks, temperature and power of each GPU; empty without a driver."""
    with _open_nvml() as nvml:
        return [] if nvml is None else [_read(nvml, handle) for handle in _handles(nvml)]


@contextmanager
def memory_reader() -> Iterator[Callable[[], int | None]]:
    """Give a function that returns the bytes in use on the first GPU, by all processes; None if not
    reported."""
    with _open_nvml() as nvml:
        handle = next(iter(_handles(nvml)), None) if nvml is not None else None

        def used() -> int | None:
            memory = _NvmlMemory()
            if nvml is None or handle is None or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)):
                return None
            return int(memory.used)

        yield used


class _NvmlMemory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


def _load(library: str) -> Any | None:
    try:
        return ctypes.CDLL(library)
    except OSError:
        return None


def _describe(cuda: Any, index: int, driver: str | None) -> Gpu | None:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(_NAME_LENGTH)
    memory = ctypes.c_size_t()
    if (
        cuda.cuDeviceGet(ctypes.byref(device), index)
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    ):
        return None

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    return Gpu(
        name=name.value.decode(errors="replace"),
        compute_capability=f"{attribute(_MAJOR)}.{attribute(_MINOR)}",
        memory=memory.value,
        unified=bool(attribute(_INTEGRATED)),
        driver=driver,
    )


@contextmanager
def _open_nvml() -> Iterator[Any | None]:
    nvml = _load(_NVML)
    if nvml is None or nvml.nvmlInit_v2():
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _driver_version() -> str | None:
    with _open_nvml() as nvml:
        text = ctypes.create_string_buffer(_NAME_LENGTH)
        if nvml is None or nvml.nvmlSystemGetDriverVersion(text, len(text)):
            return None
        return text.value.decode(errors="replace")


def _handles(nvml: Any) -> list[ctypes.c_void_p]:
    count = ctypes.c_uint()
    if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return []
    handles = [ctypes.c_void_p() for _ in range(count.value)]
    return [
        handle
        for index, handle in enumerate(handles)
        if not nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
    ]


def _read(nvml: Any, handle: ctypes.c_void_p) -> GpuReading:
    def number(function: str, *arguments: int) -> int | None:
        value = ctypes.c_uint()
        failed = getattr(nvml, function)(handle, *arguments, ctypes.byref(value))
        return None if failed else value.value

    def watts(function: str) -> float | None:
        milliwatts = number(function)
        return None if milliwatts is None else milliwatts / 1000

    name = ctypes.create_string_buffer(_NAME_LENGTH)
    unnamed = nvml.nvmlDeviceGetName(handle, name, len(name))
    return GpuReading(
        name=None if unnamed else name.value.decode(errors="replace"),
        sm_clock_mhz=number("nvmlDeviceGetClockInfo", _SM_CLOCK),
        memory_clock_mhz=number("nvmlDeviceGetClockInfo", _MEMORY_CLOCK),
        temperature_c=number("nvmlDeviceGetTemperature", _GPU_TEMPERATURE),
        power_w=watts("nvmlDeviceGetPowerUsage"),
        power_limit_w=watts("nvmlDeviceGetEnforcedPowerLimit"),
    )
