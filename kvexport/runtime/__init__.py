"""The runtime: a bundle generates text on ONNX Runtime. Needs numpy, onnxruntime and tokenizers, nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvexport.runtime.generation import Generation, Stream
    from kvexport.runtime.session import Memory, Session, open_bundle

__all__ = ["Generation", "Memory", "Session", "Stream", "open_bundle"]

_LAZY = {"Generation": "generation", "Stream": "generation", "Memory": "session", "Session": "session", "open_bundle": "session"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        try:
            module = import_module(f"kvexport.runtime.{_LAZY[name]}")
        except ModuleNotFoundError as error:
            if error.name != "onnxruntime":
                raise
            from kvexport.errors import CannotRunHere

            raise CannotRunHere("onnxruntime is not installed", fix="pip install 'kvexport[cpu]'") from error
        return getattr(module, name)
    raise AttributeError(f"module 'kvexport.runtime' has no attribute {name!r}")
