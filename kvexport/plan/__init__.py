"""Predict memory use and speed on a target from a model's config.json and the target's published values."""

from kvexport.plan.compare import Comparison
from kvexport.plan.memory import PRECISIONS, Memory
from kvexport.plan.planner import Plan, Range, Row, plan

__all__ = ["PRECISIONS", "Comparison", "Memory", "Plan", "Range", "Row", "plan"]
