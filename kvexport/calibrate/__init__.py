"""Calibration: which text runs through a layer, and the moments that are kept of it."""

from kvexport.calibrate.moments import Moments, MomentsAccumulator
from kvexport.calibrate.peaks import LayerPeaks, PeakMeter
from kvexport.calibrate.positions import Rotations, over_positions, unrotated
from kvexport.calibrate.recipe import Recipe, recipe_for
from kvexport.calibrate.sampling import steps as sampling_steps
from kvexport.calibrate.statistics import Statistics, save_header, save_moments
from kvexport.calibrate.tokens import calibration_windows

__all__ = [
    "LayerPeaks",
    "Moments",
    "MomentsAccumulator",
    "PeakMeter",
    "Recipe",
    "Rotations",
    "Statistics",
    "calibration_windows",
    "over_positions",
    "recipe_for",
    "sampling_steps",
    "save_header",
    "save_moments",
    "unrotated",
]
