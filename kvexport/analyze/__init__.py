"""Analysis of a checkpoint's KV cache and of its conversion, as data and as an HTML page."""

from kvexport.analyze.analysis import TOKENS, Analysis, Facts, LayerAnalysis, Sensitivity, analyze, compare
from kvexport.analyze.page import render, require_page, save

__all__ = [
    "TOKENS",
    "Analysis",
    "Facts",
    "LayerAnalysis",
    "Sensitivity",
    "analyze",
    "compare",
    "render",
    "require_page",
    "save",
]
