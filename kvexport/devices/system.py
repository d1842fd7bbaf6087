"""What Linux says of the machine: its memory, the board, Jetson's L4T release. Knows no engine, and guesses nothing."""

from __future__ import annotations

import re
from pathlib import Path


def text_of(path: Path) -> str:
    """A system file's text; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def board(root: Path = Path("/")) -> str | None:
    """The board's name, such as "NVIDIA Jetson Orin Nano Developer Kit"."""
    return text_of(root / "proc/device-tree/model").strip("\0 \n") or None


def l4t_release(root: Path = Path("/")) -> str | None:
    """Such as "36.4.3"."""
    release = re.search(r"R(\d+).*REVISION: (\d+(?:\.\d+)*)", text_of(root / "etc/nv_tegra_release"))
    return f"{release[1]}.{release[2]}" if release else None


def total_memory(root: Path = Path("/")) -> int | None:
    """Bytes."""
    total = re.search(r"^MemTotal:\s*(\d+) kB", text_of(root / "proc/meminfo"), re.MULTILINE)
    return 1024 * int(total[1]) if total else None
