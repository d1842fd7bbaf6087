"""Build TensorRT engines: lower a bundle's graph and build a plan from it, on the device that will run it.

TensorRT, polygraphy and the onnx packages are imported when a build begins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvexport.bundle.engine_record import BuildRecord, engine_directory, read_record
from kvexport.engine.options import EngineOptions

if TYPE_CHECKING:
    from kvexport.engine.build import build_engine

__all__ = [
    "BuildRecord",
    "EngineOptions",
    "build_engine",
    "engine_directory",
    "read_record",
]


def __getattr__(name: str) -> Any:
    if name == "build_engine":
        from kvexport.engine.build import build_engine

        return build_engine
    raise AttributeError(f"module 'kvexport.engine' has no attribute {name!r}")
