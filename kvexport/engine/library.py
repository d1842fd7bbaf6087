"""TensorRT or TensorRT-RTX, whichever is asked for, behind one name; knows how they are installed and what they log.

Must not know what is built with them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from kvexport.devices.capabilities import OLDEST_TENSORRT
from kvexport.devices.versions import Version, release_of
from kvexport.errors import CannotRunHere
from kvexport.packages import PACKAGES, install_command

MODULES = {engine: PACKAGES[engine].module for engine in ("tensorrt", "tensorrt-rtx")}
_INSTALL = {
    "tensorrt": f"{install_command('tensorrt')}; on a Jetson TensorRT comes with JetPack: sudo apt install python3-libnvinfer, "
    "and a virtual environment made with --system-site-packages",
    "tensorrt-rtx": f"{install_command('tensorrt-rtx')} (Linux on x86_64)",
}
_SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"
_MATTERS = ("could not be allocated", "not enough memory", "insufficient memory", "out of memory")


@dataclass(frozen=True)
class TensorRTLibrary:
    """An imported TensorRT: its module, which of the two it is, its version, and its log."""

    engine: str
    trt: Any
    version: Version
    log: Any  # a trt.ILogger: `errors` and `warnings` since they were last cleared

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """Those that it builds for ahead of time, such as "8.6"; none for the full TensorRT."""
        names = getattr(self.trt, "ComputeCapability", None) if self.engine == "tensorrt-rtx" else None
        numbers = [
            name.removeprefix("SM") for name in getattr(names, "__members__", ()) if name.startswith("SM")
        ]
        return tuple(f"{number[:-1]}.{number[-1]}" for number in sorted(numbers, key=int))

    def __str__(self) -> str:
        return f"{'TensorRT-RTX' if self.engine == 'tensorrt-rtx' else 'TensorRT'} {self.trt.__version__}"


def installed_engines() -> list[str]:
    """The engines whose Python package is there, without importing it."""
    return [engine for engine, module in MODULES.items() if find_spec(module) is not None]


def load_library(engine: str) -> TensorRTLibrary:
    """Import an engine's package, and polygraphy with it; a process can have one of the two engines.

    Raises:
        CannotRunHere: it is not installed, or its libraries do not load, or this process has the other one.
    """
    try:
        trt = import_module(MODULES[engine])
        with _polygraphy_for(engine):
            config = import_module("polygraphy.config")
            import_module("polygraphy.backend.trt")
    except ModuleNotFoundError as error:
        fix = _INSTALL[engine] if error.name == MODULES[engine] else f"pip install {error.name}"
        raise CannotRunHere(
            f"{error.name} is not installed, and building with {engine} needs it", fix=fix
        ) from error
    except (ImportError, OSError) as error:
        raise CannotRunHere(
            f"{MODULES[engine]} is installed but does not load", got=error, fix=_INSTALL[engine]
        ) from error
    if (engine == "tensorrt-rtx") != config.USE_TENSORRT_RTX:
        raise CannotRunHere(
            "polygraphy serves one engine in a process, and here it is the other one",
            got=engine,
            fix="build in another process",
        )
    version = release_of(trt.__version__)
    if engine == "tensorrt" and version < OLDEST_TENSORRT:
        raise CannotRunHere(
            "this TensorRT is too old", got=trt.__version__, expected="10.3 or later (JetPack 6.1)"
        )
    return TensorRTLibrary(engine, trt, version, _log(engine, trt))


@contextmanager
def _polygraphy_for(engine: str) -> Iterator[None]:
    """Polygraphy chooses between the engines by a variable of the environment, once, when it is imported."""
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "1" if engine == "tensorrt-rtx" else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before


_LOGS: dict[str, Any] = {}  # TensorRT keeps the first that a process gives it


def _log(engine: str, trt: Any) -> Any:
    if engine in _LOGS:
        return _LOGS[engine]

    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps errors, and the warnings that matter; says nothing itself."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING and any(words in message.lower() for words in _MATTERS):
                self.warnings.append(message)

        def clear(self) -> None:
            self.errors.clear()
            self.warnings.clear()

    _LOGS[engine] = Log()
    return _LOGS[engine]
