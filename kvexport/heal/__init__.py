"""Healing: a short distillation of a converted decoder's attention weights against the original's logits."""

from kvexport.heal.distil import heal
from kvexport.heal.report import Healed, HealOptions, HealReport

__all__ = ["HealOptions", "HealReport", "Healed", "heal"]
