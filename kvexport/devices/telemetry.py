"""Describe this machine while it is measured: clocks, power mode, temperatures, memory.

Read from Linux's sysfs, Jetson's nvpmodel and NVML. A value that the machine does not report is None, or
missing from its table.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvexport.devices.gpu import read_gpus
from kvexport.devices.system import board, l4t_release, text_of, total_memory

_JETSON_MEMORY_CLOCK = "sys/kernel/debug/bpmp/debug/clk/emc/rate"  # Hz; only root may read it


def describe(root: Path = Path("/")) -> dict[str, Any]:
    """What is constant during a run: architecture, processor, cores, memory, board, L4T release, power
    mode."""
    model = re.search(r"^model name\s*:\s*(.+)$", text_of(root / "proc/cpuinfo"), re.MULTILINE)
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
    """What changes during a run: temperatures in °C, clocks in MHz, CPU governors, and each GPU's reading."""
    temperatures: dict[str, float] = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        kind, value = text_of(zone / "type").strip(), _number(zone / "temp")
        if kind and value is not None:
            temperatures[kind] = value / 1000
    clocks: dict[str, float] = {}
    governors: dict[str, str] = {}
    for policy in sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*")):
        if (value := _number(policy / "scaling_cur_freq")) is not None:
            clocks[policy.name] = value / 1e3  # kHz
        if governor := text_of(policy / "scaling_governor").strip():
            governors[policy.name] = governor
    for device in sorted((root / "sys/class/devfreq").glob("*")):
        if (value := _number(device / "cur_freq")) is not None:
            clocks[device.name] = value / 1e6  # Hz
    if (value := _number(root / _JETSON_MEMORY_CLOCK)) is not None:
        clocks["emc"] = value / 1e6
    return {
        "temperature_c": temperatures,
        "clock_mhz": clocks,
        "cpu_governor": governors,
        "gpus": [asdict(reading) for reading in read_gpus()],
    }


def peak_host_bytes(root: Path = Path("/")) -> int | None:
    """Peak resident memory of this process in bytes, mapped files included; None if it is not reported."""
    peak = re.search(r"^VmHWM:\s*(\d+) kB", text_of(root / "proc/self/status"), re.MULTILINE)
    return 1024 * int(peak[1]) if peak else None


def _power_mode(root: Path) -> str | None:
    """Name of Jetson's power mode, or its number if it has no name."""
    status = re.search(r"pmode:(\d+)", text_of(root / "var/lib/nvpmodel/status"))
    if status is None:
        return None
    number = int(status[1])
    names = re.findall(r"POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)", text_of(root / "etc/nvpmodel.conf"))
    return next((name for known, name in names if int(known) == number), str(number))


def _number(path: Path) -> int | None:
    text = text_of(path).strip()
    return int(text) if re.fullmatch(r"-?\d+", text) else None
