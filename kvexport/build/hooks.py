"""Functions that a build calls at certain points. Tests use them to observe a build and to inject faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvexport.convert import CompressionPlan
from kvexport.model.decoder import Layer


def _same_plan(plan: CompressionPlan) -> CompressionPlan:
    return plan


def _same_layer(layer: Layer) -> Layer:
    return layer


@dataclass(frozen=True)
class BuildHooks:
    """Each function returns what the build uses in place of its argument; by default the argument itself.

    Attributes:
        plan: called with the compression plan, before conversion.
        graph_layer: called with each converted layer, before it is written to the graph, and to the graph
            only.
    """

    plan: Callable[[CompressionPlan], CompressionPlan] = _same_plan
    graph_layer: Callable[[Layer], Layer] = _same_layer
