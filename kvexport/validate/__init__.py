"""Compare a bundle with its PyTorch reference, or, in `validate.evaluate`, with the original model."""

from kvexport.validate.reference_run import ReferenceRecorder, read_reference
from kvexport.validate.validation import validate_bundle, validate_graph
from kvexport.validate.verdict import ValidationReport, judge

__all__ = [
    "ReferenceRecorder",
    "ValidationReport",
    "judge",
    "read_reference",
    "validate_bundle",
    "validate_graph",
]
