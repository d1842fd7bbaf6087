"""Conversion: a trained decoder's layers, with fewer KV heads, and what that is predicted and measured to cost."""

from kvexport.convert.groups import kv_heads_for
from kvexport.convert.methods import AUTO, METHOD_NAMES, candidates
from kvexport.convert.pipeline import Conversion, ConvertedLayer, convert, measure, unconverted
from kvexport.layer_report import LayerReport

__all__ = [
    "AUTO", "METHOD_NAMES", "Conversion", "ConvertedLayer", "LayerReport", "candidates", "convert", "kv_heads_for", "measure",
    "unconverted",
]  # fmt: skip
