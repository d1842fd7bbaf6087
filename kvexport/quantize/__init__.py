"""Quantisation of weights to 4 and 8 bits."""

from kvexport.quantize.grid import Grid, dequantize, grid_for, quantized, round_to_nearest

__all__ = ["Grid", "dequantize", "grid_for", "quantized", "round_to_nearest"]
