"""Validation: compare a bundle with its PyTorch reference; `validate.evaluate` compares it with the original model."""

from kvexport.validate.proof import prove, validate
from kvexport.validate.reference_run import ReferenceRecorder, read_reference
from kvexport.validate.verdict import ValidationReport, judge

__all__ = ["ReferenceRecorder", "ValidationReport", "judge", "prove", "read_reference", "validate"]
