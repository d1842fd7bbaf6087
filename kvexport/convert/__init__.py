"""Compression of a trained decoder's KV heads, without training; predicted and measured loss per layer.

Names are imported on first use, because most of them need torch and the command line reads `method_names`
alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvexport.bundle.layer_report import LayerReport
    from kvexport.convert.compression_plan import CompressionPlan, plan_compression, sizes_to_analyze
    from kvexport.convert.groups import KVShape, kv_heads_for, trained_shape
    from kvexport.convert.layer_sensitivity import LayerSensitivity
    from kvexport.convert.method_names import METHOD_NAMES
    from kvexport.convert.methods import LayerPlan, Method, methods_for, without_output_bias
    from kvexport.convert.pipeline import (
        Conversion,
        ConvertedLayer,
        convert,
        measure_moments,
        unconverted_layers,
    )
    from kvexport.convert.request import CompressionRequest, fixed_shape, require_ratio, uniform_shape
    from kvexport.convert.sensitivity import analyze_sensitivity
    from kvexport.convert.streams import split_windows

__all__ = [
    "METHOD_NAMES",
    "CompressionPlan",
    "CompressionRequest",
    "Conversion",
    "ConvertedLayer",
    "KVShape",
    "LayerPlan",
    "LayerReport",
    "LayerSensitivity",
    "Method",
    "analyze_sensitivity",
    "convert",
    "fixed_shape",
    "kv_heads_for",
    "measure_moments",
    "methods_for",
    "plan_compression",
    "require_ratio",
    "sizes_to_analyze",
    "split_windows",
    "trained_shape",
    "unconverted_layers",
    "uniform_shape",
    "without_output_bias",
]

_MODULES = {
    "METHOD_NAMES": "kvexport.convert.method_names",
    "CompressionPlan": "kvexport.convert.compression_plan",
    "CompressionRequest": "kvexport.convert.request",
    "Conversion": "kvexport.convert.pipeline",
    "ConvertedLayer": "kvexport.convert.pipeline",
    "KVShape": "kvexport.convert.groups",
    "LayerPlan": "kvexport.convert.methods",
    "LayerReport": "kvexport.bundle.layer_report",
    "LayerSensitivity": "kvexport.convert.layer_sensitivity",
    "Method": "kvexport.convert.methods",
    "analyze_sensitivity": "kvexport.convert.sensitivity",
    "convert": "kvexport.convert.pipeline",
    "fixed_shape": "kvexport.convert.request",
    "kv_heads_for": "kvexport.convert.groups",
    "measure_moments": "kvexport.convert.pipeline",
    "methods_for": "kvexport.convert.methods",
    "plan_compression": "kvexport.convert.compression_plan",
    "require_ratio": "kvexport.convert.request",
    "sizes_to_analyze": "kvexport.convert.compression_plan",
    "split_windows": "kvexport.convert.streams",
    "trained_shape": "kvexport.convert.groups",
    "unconverted_layers": "kvexport.convert.pipeline",
    "uniform_shape": "kvexport.convert.request",
    "without_output_bias": "kvexport.convert.methods",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'kvexport.convert' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
