"""The runtime: a bundle generates text on ONNX Runtime. Needs numpy, onnxruntime and tokenizers, nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvexport.runtime.session import Generation, Session, open_bundle

__all__ = ["Generation", "Session", "open_bundle"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        import kvexport.runtime.session as session

        return getattr(session, name)
    raise AttributeError(f"module 'kvexport.runtime' has no attribute {name!r}")
