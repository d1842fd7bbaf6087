"""Predict memory use and speed on a target from a model's config.json and the target's published values."""

from kvexport.plan.compare import Comparison
from kvexport.plan.memory import Memory
from kvexport.plan.planner import Plan, Range, Row, plan
from kvexport.plan.weights import WeightBytes

__all__ = ["Comparison", "Memory", "Plan", "Range", "Row", "WeightBytes", "plan"]
