"""Plans: from a model's config.json and a target's figures alone, what will fit and how fast it is predicted to be."""

from kvexport.plan.compare import Comparison
from kvexport.plan.memory import PRECISIONS, Memory
from kvexport.plan.planner import Plan, Range, Row, plan

__all__ = ["PRECISIONS", "Comparison", "Memory", "Plan", "Range", "Row", "plan"]
