"""The part of the sensitivity analysis that every build shares, and the part that one build uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvexport.convert import CompressionRequest, LayerSensitivity, Method
from kvexport.convert.request import group_sizes
from kvexport.model.decoder import Attention


def analyzed_sizes(attention: Attention) -> list[int]:
    """Group sizes of a saved analysis, ascending: those of a request that names none."""
    return group_sizes(CompressionRequest(), attention)


def of_methods(layer: LayerSensitivity, methods: Sequence[Method]) -> LayerSensitivity:
    """The sensitivity for some of its methods, in the order given."""
    return replace(layer, key_sensitivity={method: layer.key_sensitivity[method] for method in methods})
