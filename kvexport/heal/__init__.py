"""Healing: short distillation of a converted decoder's attention weights towards the original's logits."""

from kvexport.heal.distil import heal
from kvexport.heal.report import HealOptions, HealReport, HealResult

__all__ = ["HealOptions", "HealReport", "HealResult", "heal"]
