"""Conversion: a trained decoder's layers, with fewer KV heads, and what that is predicted and measured to cost."""

from kvexport.bundle.layer_report import LayerReport
from kvexport.convert.choose import Choice, choose
from kvexport.convert.groups import Shape, kv_heads_for, trained_shape
from kvexport.convert.methods import METHOD_NAMES, Method, Way, methods_for
from kvexport.convert.pipeline import Conversion, ConvertedLayer, convert, measure, unconverted
from kvexport.convert.request import Wish, fixed_shape, require_ratio, uniform_shape
from kvexport.convert.sensitivity import LayerSurvey, survey
from kvexport.convert.streams import split

__all__ = [
    "METHOD_NAMES",
    "Choice",
    "Conversion",
    "ConvertedLayer",
    "LayerReport",
    "LayerSurvey",
    "Method",
    "Shape",
    "Way",
    "Wish",
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
