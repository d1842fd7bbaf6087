"""Calibration: token windows, moments of each layer's activations on them, and saved statistics."""

from kvexport.calibrate.moments import Moments, MomentsAccumulator
from kvexport.calibrate.peaks import LayerPeaks, PeakMeter
from kvexport.calibrate.positions import Rotations, average_over_positions, uncentre_keys
from kvexport.calibrate.recipe import Recipe, recipe_for
from kvexport.calibrate.sampling import sampling_steps
from kvexport.calibrate.statistics import Statistics, StatisticsSource, StatisticsWriter
from kvexport.calibrate.tokens import calibration_windows, usable_recipe

__all__ = [
    "LayerPeaks",
    "Moments",
    "MomentsAccumulator",
    "PeakMeter",
    "Recipe",
    "Rotations",
    "Statistics",
    "StatisticsSource",
    "StatisticsWriter",
    "average_over_positions",
    "calibration_windows",
    "recipe_for",
    "sampling_steps",
    "uncentre_keys",
    "usable_recipe",
]
