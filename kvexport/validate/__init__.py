"""Proof: a bundle against its PyTorch twin, and against the model that it was made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvexport.validate.proof import prove, validate
from kvexport.validate.reference_run import TwinRecorder, read_twin
from kvexport.validate.verdict import ValidationReport, judge

if TYPE_CHECKING:
    from kvexport.validate.evaluate import Evaluation, evaluate

__all__ = [
    "Evaluation",
    "TwinRecorder",
    "ValidationReport",
    "evaluate",
    "judge",
    "prove",
    "read_twin",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name in ("Evaluation", "evaluate"):  # needs torch; proving a bundle does not
        from importlib import import_module

        return getattr(import_module("kvexport.validate.evaluate"), name)
    raise AttributeError(f"module 'kvexport.validate' has no attribute {name!r}")
