"""The runtime: a bundle generates text, on ONNX Runtime or on one of its TensorRT engines.

Needs numpy, tokenizers, and the engine that it runs on; nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvexport.runtime.generation import Generation, Stream
    from kvexport.runtime.interface import DeviceMemory
    from kvexport.runtime.sequences import Cache
    from kvexport.runtime.session import Memory, Session, open_bundle

__all__ = ["Cache", "DeviceMemory", "Generation", "Memory", "Session", "Stream", "open_bundle"]

_LAZY = {
    "Cache": "sequences", "DeviceMemory": "interface", "Generation": "generation", "Memory": "session", "Session": "session",
    "Stream": "generation", "open_bundle": "session",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"kvexport.runtime.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'kvexport.runtime' has no attribute {name!r}")
