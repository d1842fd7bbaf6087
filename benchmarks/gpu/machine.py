"""Describe this machine for a record: its GPU, the versions of packages, GPU memory over time."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading
from contextlib import ExitStack
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from kvexport.devices.gpu import find_gpu, memory_reader, read_gpus

_PACKAGES = (
    "numpy",
    "torch",
    "triton",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "tensorrt_rtx_cu13",
    "polygraphy",
    "cuda-bindings",
    "nvidia-ml-py",
)
_ROOT = Path(__file__).resolve().parents[2]
_INTERVAL = 0.1  # seconds between two readings of the GPU's memory


def describe_gpu() -> dict[str, Any] | None:
    """The first GPU by the driver, with its clocks, temperature and power; None without one."""
    gpu = find_gpu()
    if gpu is None:
        return None
    reading = next(iter(read_gpus()), None)
    return {**(asdict(reading) if reading is not None else {}), **asdict(gpu)}


def versions() -> dict[str, str]:
    """Of Python, kvexport's commit, and the installed ones of the packages that matter."""
    installed = {"python": platform.python_version()}
    try:
        described = subprocess.run(
            ["git", "-C", str(_ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
        )
        if described.returncode == 0:
            installed["commit"] = described.stdout.strip()
    except OSError:
        pass  # no git
    for name in _PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def without_paths(text: str, work: Path) -> str:
    """A log with the folders of this machine taken out, since records are published."""
    for folder, name in (
        (work, "WORK"),
        (_ROOT, "REPOSITORY"),
        (Path(sys.prefix), "PYTHON"),
        (Path.home(), "HOME"),
    ):
        for spelled in dict.fromkeys((str(folder), str(folder.resolve()))):
            if len(spelled) > 1:
                text = text.replace(spelled, name)
    return text


class MemoryWatch:
    """Sample the memory in use on the first GPU, by all processes, while this is open.

    Attributes:
        before: bytes in use when it was opened; None if NVML does not report it.
        peak: the most bytes seen, reading every 100 ms; None likewise.
    """

    before: int | None = None
    peak: int | None = None

    def __enter__(self) -> MemoryWatch:
        self._resources = ExitStack()
        self._read = self._resources.enter_context(memory_reader())
        self._stop = threading.Event()
        self.before = self.peak = self._read()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(_INTERVAL):
            if (used := self._read()) is not None:
                self.peak = max(self.peak or 0, used)

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._resources.close()

    @property
    def used(self) -> int | None:
        """Peak minus the start, in bytes: what the measured process took, if no other process used the
        GPU."""
        return None if self.peak is None or self.before is None else self.peak - self.before
