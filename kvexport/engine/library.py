"""Import TensorRT or TensorRT-RTX, and collect its log messages."""

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
    "tensorrt": f"{install_command('tensorrt')}; on a Jetson TensorRT comes with JetPack: "
    "sudo apt install python3-libnvinfer, and a virtual environment made with --system-site-packages",
    "tensorrt-rtx": f"{install_command('tensorrt-rtx')} (Linux on x86_64)",
}
_SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"
_MEMORY_WARNINGS = ("could not be allocated", "not enough memory", "insufficient memory", "out of memory")


@dataclass(frozen=True)
class TensorRTLibrary:
    """An imported TensorRT.

    Attributes:
        engine: "tensorrt" or "tensorrt-rtx".
        trt: the module.
        version: such as (10, 3, 0, 30).
        log: a trt.ILogger whose `errors` and `warnings` are the messages since `clear`.
    """

    engine: str
    trt: Any
    version: Version
    log: Any

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """Compute capabilities that it builds for ahead of time, such as "8.6"; none for TensorRT."""
        names = getattr(self.trt, "ComputeCapability", None) if self.engine == "tensorrt-rtx" else None
        numbers = [
            name.removeprefix("SM") for name in getattr(names, "__members__", ()) if name.startswith("SM")
        ]
        return tuple(f"{number[:-1]}.{number[-1]}" for number in sorted(numbers, key=int))

    def __str__(self) -> str:
        return f"{'TensorRT-RTX' if self.engine == 'tensorrt-rtx' else 'TensorRT'} {self.trt.__version__}"


def installed_engines() -> list[str]:
    """Engines whose Python package is installed; the packages are not imported."""
    return [engine for engine, module in MODULES.items() if find_spec(module) is not None]


def load_library(engine: str) -> TensorRTLibrary:
    """Import an engine's package, and polygraphy. A process can build with only one of the two engines.

    Raises:
        CannotRunHere: the package is not installed, its libraries do not load, its version is too old, or
            this process has loaded the other engine.
    """
    try:
        trt = import_module(MODULES[engine])
        with _polygraphy_for(engine):
            config = import_module("polygraphy.config")
            import_module("polygraphy.backend.trt")
    except ModuleNotFoundError as error:
        fix = _INSTALL[engine] if error.name == MODULES[engine] else f"pip install {error.name}"
        raise CannotRunHere(
            f"the package {error.name} must be installed to build with {engine}", fix=fix
        ) from error
    except (ImportError, OSError) as error:
        raise CannotRunHere(
            f"the package {MODULES[engine]} must load", got=error, fix=_INSTALL[engine]
        ) from error
    if (engine == "tensorrt-rtx") != config.USE_TENSORRT_RTX:
        raise CannotRunHere(
            "a process can build with only one of tensorrt and tensorrt-rtx",
            got=f"{engine}, after the other one",
            fix="build in another process",
        )
    version = release_of(trt.__version__)
    if engine == "tensorrt" and version < OLDEST_TENSORRT:
        raise CannotRunHere(
            "TensorRT must be new enough", got=trt.__version__, expected="10.3 or later (JetPack 6.1)"
        )
    return TensorRTLibrary(engine, trt, version, _log(engine, trt))


@contextmanager
def _polygraphy_for(engine: str) -> Iterator[None]:
    """Set the environment variable by which polygraphy chooses the engine when it is imported."""
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "1" if engine == "tensorrt-rtx" else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before


_LOGS: dict[str, Any] = {}  # TensorRT uses the first logger of a process for all builders


def _log(engine: str, trt: Any) -> Any:
    if engine in _LOGS:
        return _LOGS[engine]

    class Log(trt.ILogger):  # type: ignore[misc]
        """Collect errors, and warnings about memory; print nothing."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING and any(
                words in message.lower() for words in _MEMORY_WARNINGS
            ):
                self.warnings.append(message)

        def clear(self) -> None:
            self.errors.clear()
            self.warnings.clear()

    _LOGS[engine] = Log()
    return _LOGS[engine]
