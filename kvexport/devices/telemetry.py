"""What a machine tells of itself while it is measured: clocks, power mode, temperatures, memory.

Knows Linux's sysfs, Jetson's nvpmodel and NVML; what is not told is null or left out of its table, and nothing is guessed.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvexport.devices.system import board, l4t_release, total_memory

_JETSON_MEMORY_CLOCK = "sys/kernel/debug/bpmp/debug/clk/emc/rate"  # Hz; only root may read it


def describe(root: Path = Path("/")) -> dict[str, Any]:
    """What does not change while something runs: architecture, processor, cores, memory, board, JetPack's L4T, power mode."""
    model = re.search(r"^model name\s*:\s*(.+)$", _text(root / "proc/cpuinfo") or "", re.MULTILINE)
    return {
        "architecture": platform.machine(),
        "cpus": os.cpu_count(),
        "processor": model[1].strip() if model else None,
        "memory_bytes": total_memory(root),
        "board": board(root),
        "l4t": l4t_release(root),
        "power_mode": _power_mode(root),
    }


def readings(root: Path = Path("/")) -> dict[str, Any]:
    """What changes: temperatures in degrees Celsius, clocks in MHz, governors of the CPU, and what NVML says of each GPU."""
    temperatures: dict[str, float] = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        kind, value = _text(zone / "type"), _number(zone / "temp")
        if kind and value is not None:
            temperatures[kind] = value / 1000
    clocks: dict[str, float] = {}
    governors: dict[str, str] = {}
    for policy in sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*")):
        if (value := _number(policy / "scaling_cur_freq")) is not None:
            clocks[policy.name] = value / 1e3  # kHz
        if governor := _text(policy / "scaling_governor"):
            governors[policy.name] = governor
    for device in sorted((root / "sys/class/devfreq").glob("*")):
        if (value := _number(device / "cur_freq")) is not None:
            clocks[device.name] = value / 1e6  # Hz
    if (value := _number(root / _JETSON_MEMORY_CLOCK)) is not None:
        clocks["emc"] = value / 1e6
    return {"temperature_c": temperatures, "clock_mhz": clocks, "cpu_governor": governors, "gpus": _nvml()}


def peak_host_bytes(root: Path = Path("/")) -> int | None:
    """The most memory that this process ever held, files that it maps included."""
    peak = re.search(r"^VmHWM:\s*(\d+) kB", _text(root / "proc/self/status") or "", re.MULTILINE)
    return 1024 * int(peak[1]) if peak else None


def _power_mode(root: Path) -> str | None:
    """The name of Jetson's power mode, or its number where no name is given."""
    status = re.search(r"pmode:(\d+)", _text(root / "var/lib/nvpmodel/status") or "")
    if status is None:
        return None
    number = int(status[1])
    names = re.findall(r"POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)", _text(root / "etc/nvpmodel.conf") or "")
    return next((name for known, name in names if int(known) == number), str(number))


def _nvml() -> list[dict[str, Any]]:
    """Name, clocks, temperature and power of each GPU, as far as it tells; nothing without the package or the driver."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return []
    questions: dict[str, Callable[[Any], Any]] = {
        "name": pynvml.nvmlDeviceGetName,
        "sm_clock_mhz": lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
        "temperature_c": lambda gpu: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
        "power_w": lambda gpu: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
        "power_limit_w": lambda gpu: pynvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000,
    }

    def told(ask: Callable[[Any], Any], about: Any) -> Any:
        try:
            return ask(about)
        except pynvml.NVMLError:  # no GPU tells everything: a Jetson's, hardly anything
            return None

    try:
        pynvml.nvmlInit()
        gpus = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
    found = [{name: told(ask, gpu) for name, ask in questions.items()} for gpu in gpus]
    pynvml.nvmlShutdown()
    return found


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _text(path) or ""
    return int(text) if re.fullmatch(r"-?\d+", text) else None
