"""What a machine tells of itself while it is measured: clocks, power mode, temperatures, memory.

Knows Linux's sysfs, Jetson's nvpmodel and NVML; what is not told is left out, and nothing is guessed.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any


def describe(root: Path = Path("/")) -> dict[str, Any]:
    """What does not change while something runs: architecture, processor, cores, memory, board, JetPack's L4T, power mode."""
    described: dict[str, Any] = {"architecture": platform.machine(), "cpus": os.cpu_count()}
    model = re.search(r"^model name\s*:\s*(.+)$", _text(root / "proc/cpuinfo") or "", re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB", _text(root / "proc/meminfo") or "", re.MULTILINE)
    release = re.search(r"# R(\d+) \(release\), REVISION: ([\d.]+)", _text(root / "etc/nv_tegra_release") or "")
    told = {
        "processor": model[1].strip() if model else None,
        "memory_bytes": 1024 * int(memory[1]) if memory else None,
        "board": (_text(root / "proc/device-tree/model") or "").rstrip("\0") or None,
        "l4t": f"{release[1]}.{release[2]}" if release else None,
        "power_mode": _power_mode(root),
    }
    return described | {name: value for name, value in told.items() if value is not None}


def readings(root: Path = Path("/")) -> dict[str, Any]:
    """What changes: temperatures in degrees Celsius, clocks in MHz, and what NVML says of each GPU."""
    told: dict[str, Any] = {}
    temperatures: dict[str, float] = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        kind, value = _text(zone / "type"), _number(zone / "temp")
        if kind and value is not None:
            temperatures[kind] = value / 1000
    if temperatures:
        told["temperature_c"] = temperatures
    clocks: dict[str, float] = {}
    for policy in sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*")):
        if (value := _number(policy / "scaling_cur_freq")) is not None:
            clocks[policy.name] = value / 1e3  # kHz
        if governor := _text(policy / "scaling_governor"):
            told["cpu_governor"] = governor
    for device in sorted((root / "sys/class/devfreq").glob("*")):
        if (value := _number(device / "cur_freq")) is not None:
            clocks[device.name] = value / 1e6  # Hz
    if clocks:
        told["clock_mhz"] = clocks
    if gpus := _nvml():
        told["gpus"] = gpus
    return told


def peak_host_bytes(root: Path = Path("/")) -> int | None:
    """The most memory that this process ever held."""
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
    """Name, clocks, temperature and power of each GPU; nothing without the package or the driver."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    gpus = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
        questions: dict[str, Any] = {
            "name": lambda gpu=gpu: pynvml.nvmlDeviceGetName(gpu),
            "sm_clock_mhz": lambda gpu=gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda gpu=gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
            "temperature_c": lambda gpu=gpu: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
            "power_w": lambda gpu=gpu: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
            "power_limit_w": lambda gpu=gpu: pynvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000,
        }
        told = {}
        for name, ask in questions.items():
            try:
                told[name] = ask()
            except pynvml.NVMLError:
                continue  # not every GPU tells everything
        gpus.append(told)
    pynvml.nvmlShutdown()
    return gpus


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _text(path) or ""
    return int(text) if re.fullmatch(r"-?\d+", text) else None
