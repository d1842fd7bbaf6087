"""What the machine says of itself: its GPU through nvidia-smi, the versions of the packages that run, memory over time."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

_FIELDS = (
    "name",
    "driver_version",
    "compute_cap",
    "memory.total",
    "memory.used",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)
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
_EVERY = 100  # milliseconds between two looks at the device's memory


def gpu_facts() -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU, with its units; None where it cannot be asked."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(_FIELDS, (each.strip() for each in said.strip().split(",")), strict=False))


def versions() -> dict[str, str]:
    """Of Python, kvexport's commit, and the installed ones of the packages that matter."""
    found = {"python": platform.python_version()}
    try:
        asked = subprocess.run(
            ["git", "-C", str(_ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
        )
        if asked.returncode == 0:
            found["commit"] = asked.stdout.strip()
    except OSError:
        pass  # no git
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


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
    """How much of the first GPU's memory all processes hold while this is open; None where nvidia-smi does not say.

    Attributes:
        before, peak: bytes when it was opened, and the most seen, looking every 100 ms.
    """

    before: int | None = None
    peak: int | None = None

    def __enter__(self) -> MemoryWatch:
        command = [
            "nvidia-smi",
            "-i",
            "0",
            "--query-gpu=memory.used",
            "--format=csv,noheader,nounits",
            "-lms",
            str(_EVERY),
        ]
        self._process: subprocess.Popen[str] | None = None
        seen = threading.Event()
        try:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError:
            return self
        self._reader = threading.Thread(target=self._read, args=(self._process, seen), daemon=True)
        self._reader.start()
        seen.wait(10)  # for the first look, before what is watched begins
        return self

    def _read(self, process: subprocess.Popen[str], seen: threading.Event) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip().isdigit():
                used = int(line) * 2**20
                self.before = used if self.before is None else self.before
                self.peak = max(self.peak or 0, used)
            seen.set()
        seen.set()

    def __exit__(self, *error: Any) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._reader.join()

    @property
    def used(self) -> int | None:
        """By how much more was held at the peak than before: what the watched process took, if nothing else ran."""
        return None if self.peak is None or self.before is None else self.peak - self.before
