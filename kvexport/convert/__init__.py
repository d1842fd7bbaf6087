"""Conversion: a trained decoder's layers, with fewer KV heads, and what that is predicted and measured to cost."""

from kvexport.bundle.layer_report import LayerReport
from kvexport.convert.choose import CompressionPlan, choose
from kvexport.convert.groups import KVShape, kv_heads_for, trained_shape
from kvexport.convert.methods import METHOD_NAMES, LayerPlan, Method, methods_for
from kvexport.convert.pipeline import Conversion, ConvertedLayer, convert, measure, unconverted
from kvexport.convert.request import CompressionRequest, fixed_shape, require_ratio, uniform_shape
from kvexport.convert.sensitivity import LayerSensitivity, survey
from kvexport.convert.streams import split

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
    "choose",
    "convert",
    "fixed_shape",
    "kv_heads_for",
    "measure",
    "methods_for",
    "require_ratio",
    "split",
    "survey",
    "trained_shape",
    "unconverted",
    "uniform_shape",
]
