"""What this machine has: its GPU by the driver's word, free memory. Knows no engine."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18  # CUdevice_attribute
_MEMORY = Path("/proc/meminfo")


@dataclass(frozen=True)
class Gpu:
    """The first GPU that the driver shows."""

    name: str
    compute_capability: str  # "8.7"
    memory: int  # bytes in all
    unified: bool  # it shares the host's memory


def find_gpu() -> Gpu | None:
    """None where there is no driver, or no GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    if cuda.cuDeviceGetName(name, len(name), device) or cuda.cuDeviceTotalMem_v2(
        ctypes.byref(memory), device
    ):
        return None

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    capability = f"{attribute(_MAJOR)}.{attribute(_MINOR)}"
    return Gpu(name.value.decode(errors="replace"), capability, memory.value, bool(attribute(_INTEGRATED)))


def available_memory() -> int:
    """Bytes of host memory that a process can still get."""
    for line in _MEMORY.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("Linux always says MemAvailable")
