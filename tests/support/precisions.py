"""Precisions of plans that `kvexport build` has no option for."""

from __future__ import annotations

from kvexport.bundle.formats import WeightFormats
from kvexport.plan.weights import Precision


def precision(dtype: str, weights: WeightFormats | None = None) -> Precision:
    """A precision; without `weights`, they are all stored in the data type."""
    return Precision(dtype, WeightFormats(dtype, dtype, dtype) if weights is None else weights)
