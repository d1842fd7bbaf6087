"""The runtime: generates text from a bundle with ONNX Runtime or TensorRT.

Needs numpy, tokenizers and the library of the chosen backend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvexport.runtime.cache.sequences import Cache
    from kvexport.runtime.cache.usage import Memory
    from kvexport.runtime.generation import Generation, Stream
    from kvexport.runtime.opening import open_bundle
    from kvexport.runtime.session import Session
    from kvexport.runtime.types import DeviceMemory

__all__ = ["Cache", "DeviceMemory", "Generation", "Memory", "Session", "Stream", "open_bundle"]

_LAZY = {
    "Cache": "cache.sequences",
    "DeviceMemory": "types",
    "Generation": "generation",
    "Memory": "cache.usage",
    "Session": "session",
    "Stream": "generation",
    "open_bundle": "opening",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"kvexport.runtime.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'kvexport.runtime' has no attribute {name!r}")
