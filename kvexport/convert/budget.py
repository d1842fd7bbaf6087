"""Which way each layer is converted: the least predicted KL within a number of cached numbers, solved exactly.

A multiple-choice knapsack over layers, by dynamic programming over cached numbers per token. What an engine's attention
can take (widths, equal or not) is a constraint on the choices. Knows a survey; runs no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvexport.convert.groups import WIDEST, KVShape
from kvexport.convert.methods import LayerPlan
from kvexport.convert.sensitivity import LayerSensitivity

_STEP = 8  # widths that every engine takes are multiples of it
_NARROWEST = 16


@dataclass(frozen=True)
class Widths:
    """Which widths of keys and values an engine's attention takes.

    Attributes:
        equal: keys and values must be equally wide, as TensorRT's fused attention wants them.
        only: the one width wanted; None: any.
    """

    equal: bool = True
    only: int | None = None

    def of(self, size: int, head_dim: int) -> list[int]:
        """Widths of a head that stands for `size` trained ones, ascending."""
        n = size * head_dim
        if self.only is not None:
            return [self.only] if self.only <= n else []
        least = min(_NARROWEST, head_dim)  # narrower than that, trained heads were not fused either
        step = min(_STEP, head_dim)
        return list(range(-(-least // step) * step, min(n, WIDEST) + 1, step))


def shapes_for(trained: KVShape, sizes: Sequence[int], widths: Widths) -> list[KVShape]:
    """What a layer may cache in groups of these sizes, its trained shape included; fewer numbers than that in all others."""
    found = [trained]
    for size in sizes:
        heads, allowed = trained.kv_heads // size, widths.of(size, trained.key_dim)
        pairs = ((key, value) for key in allowed for value in ((key,) if widths.equal else allowed))
        found += [
            shape for key, value in pairs if (shape := KVShape(heads, key, value)).kv_width < trained.kv_width
        ]
    return found


class Frontier:
    """The least predicted KL for every number of cached numbers per token, and the ways that have it."""

    def __init__(self, layers: Sequence[LayerSensitivity], allowed: Sequence[Sequence[KVShape]]) -> None:
        """`allowed` are the shapes that each layer may take."""
        self._options = [_undominated(layer, shapes) for layer, shapes in zip(layers, allowed, strict=True)]
        every = [layer_plan.shape.kv_width for options in self._options for layer_plan, _ in options]
        self._unit = math.gcd(*every)
        self.most = sum(layer.trained.kv_width for layer in layers)
        size = self.most // self._unit + 1
        least: NDArray[np.float64] = np.zeros(size)
        self._taken: list[NDArray[np.int16]] = []
        for options in self._options:
            extended, taken = np.full(size, np.inf), np.zeros(size, np.int16)
            for index, (layer_plan, kl) in enumerate(options):
                cost = layer_plan.shape.kv_width // self._unit
                shifted = least[: size - cost] + kl
                better = shifted < extended[cost:]
                extended[cost:][better] = shifted[better]
                taken[cost:][better] = index
            least = extended
            self._taken.append(taken)
        self._least = least

    @property
    def fewest(self) -> int:
        """Cached numbers per token that no choice goes below."""
        return int(np.isfinite(self._least).argmax()) * self._unit

    def kl(self, kv_width: int) -> float:
        """Least predicted KL, nats per token, with at most `kv_width` numbers cached per token in all layers."""
        return float(self._least[min(kv_width, self.most) // self._unit])

    def layer_plans(self, kv_width: int) -> list[LayerPlan]:
        """The ways that have it, layer by layer."""
        at, found = min(kv_width, self.most) // self._unit, []
        for options, taken in zip(reversed(self._options), reversed(self._taken), strict=True):
            layer_plan, _ = options[taken[at]]
            found.append(layer_plan)
            at -= layer_plan.shape.kv_width // self._unit
        return found[::-1]

    def cheapest(self, kl: float) -> int:
        """Fewest cached numbers per token with a predicted KL of at most `kl`."""
        return int((self._least <= kl).argmax()) * self._unit


def _undominated(layer: LayerSensitivity, shapes: Sequence[KVShape]) -> list[tuple[LayerPlan, float]]:
    """Ways into these shapes with their predicted KL: none that loses as much as another which caches no more."""
    every = (LayerPlan(method, shape) for shape in shapes for method in layer.methods)
    kept: list[tuple[LayerPlan, float]] = []
    for layer_plan, kl in sorted(
        ((layer_plan, layer.kl(layer_plan)) for layer_plan in every),
        key=lambda each: (each[0].shape.kv_width, each[1]),
    ):
        if not kept or kl < kept[-1][1]:
            kept.append((layer_plan, kl))
    return kept
