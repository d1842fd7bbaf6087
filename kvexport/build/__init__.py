"""The build pipeline: checkpoint to bundle or to Hugging Face checkpoint. torch is imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvexport.build.hooks import BuildHooks
    from kvexport.build.options import BuildOptions
    from kvexport.build.pipeline import build, calibrate, compress
    from kvexport.build.report import BuildReport

__all__ = ["BuildHooks", "BuildOptions", "BuildReport", "build", "calibrate", "compress"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from importlib import import_module

        return getattr(import_module("kvexport.build.pipeline"), name)
    raise AttributeError(f"module 'kvexport.build' has no attribute {name!r}")
