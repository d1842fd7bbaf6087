"""Read what Linux reports about this machine: memory, board, and Jetson's L4T release."""

from __future__ import annotations

import re
from pathlib import Path


def text_of(path: Path) -> str:
    """Text of a system file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def board(root: Path = Path("/")) -> str | None:
    """Name of the board, such as "NVIDIA Jetson Orin Nano Developer Kit"; None if there is no device tree."""
    return text_of(root / "proc/device-tree/model").strip("\0 \n") or None


def l4t_release(root: Path = Path("/")) -> str | None:
    """Jetson's L4T release, such as "36.4.3"; None on other machines."""
    release = re.search(r"R(\d+).*REVISION: (\d+(?:\.\d+)*)", text_of(root / "etc/nv_tegra_release"))
    return f"{release[1]}.{release[2]}" if release else None


def total_memory(root: Path = Path("/")) -> int | None:
    """Host memory in bytes; None if it is not reported."""
    return _meminfo(root, "MemTotal")


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of host memory that a process can still allocate."""
    available = _meminfo(root, "MemAvailable")
    assert available is not None  # every Linux since 3.14 reports it
    return available


def _meminfo(root: Path, key: str) -> int | None:
    line = re.search(rf"^{key}:\s*(\d+) kB", text_of(root / "proc/meminfo"), re.MULTILINE)
    return 1024 * int(line[1]) if line else None
