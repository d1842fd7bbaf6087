"""Measure a bundle's prefill speed, decode speed and memory use on this machine."""

from kvexport.bench.measure import BenchOptions, Result, measure, ratios
from kvexport.devices.telemetry import describe, readings

__all__ = ["BenchOptions", "Result", "describe", "measure", "ratios", "readings"]
