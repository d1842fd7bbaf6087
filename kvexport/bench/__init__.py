"""Benchmarks of bundles on the machine at hand: prefill, decode and memory, with what the machine says of itself."""

from kvexport.bench.measure import Plan, Result, measure, ratios
from kvexport.devices.telemetry import describe, readings

__all__ = ["Plan", "Result", "describe", "measure", "ratios", "readings"]
