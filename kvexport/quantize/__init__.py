"""Quantisation of weights to 4 and 8 bits."""

from kvexport.quantize.grid import Grid, dequantize, grid_for, quantized, round_to_nearest
from kvexport.quantize.layers import METHODS, Method, WeightSettings, quantize_layer
from kvexport.quantize.model import LayerQuantizer, quantize_embedding, quantize_head, quantize_layers

__all__ = [
    "METHODS",
    "Grid",
    "LayerQuantizer",
    "Method",
    "WeightSettings",
    "dequantize",
    "grid_for",
    "quantize_embedding",
    "quantize_head",
    "quantize_layer",
    "quantize_layers",
    "quantized",
    "round_to_nearest",
]
