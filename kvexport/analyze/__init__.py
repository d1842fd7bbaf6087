"""Analysis: what a checkpoint's cache is like, what a conversion does to it, and the page that shows both."""

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
