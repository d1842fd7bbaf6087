"""Choice of a plan for every layer: the least predicted KL within a number of cached numbers, solved exactly.

A multiple-choice knapsack over layers, by dynamic programming over cached numbers per token. What an engine's
attention supports (widths, equal or not) limits the shapes that a layer can choose from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvexport.convert.groups import WIDEST, KVShape
from kvexport.convert.layer_sensitivity import LayerSensitivity
from kvexport.convert.methods import LayerPlan

_STEP = 8  # widths that every engine supports are multiples of it
_NARROWEST = 16


@dataclass(frozen=True)
class Widths:
    """Widths of keys and values that an engine's attention supports.

    Attributes:
        equal: whether keys and values must be equally wide, as TensorRT's fused attention requires.
        only: the one width allowed; None: any.
    """

    equal: bool = True
    only: int | None = None

    def of(self, size: int, head_dim: int) -> list[int]:
        """Widths of a cached head that `size` trained heads share, ascending."""
        n = size * head_dim
        if self.only is not None:
            return [self.only] if self.only <= n else []
        least = min(_NARROWEST, head_dim)  # trained heads narrower than that were not fused either
        step = min(_STEP, head_dim)
        return list(range(-(-least // step) * step, min(n, WIDEST) + 1, step))


def shapes_for(trained: KVShape, sizes: Sequence[int], widths: Widths) -> list[KVShape]:
    """Cache shapes that a layer can have.

    Args:
        trained: the shape before conversion; it comes first in the result.
        sizes: group sizes.
        widths: widths that the engine supports.

    Returns:
        `trained`, and all shapes that cache fewer numbers.
    """
    shapes = [trained]
    for size in sizes:
        heads, allowed = trained.kv_heads // size, widths.of(size, trained.key_dim)
        pairs = ((key, value) for key in allowed for value in ((key,) if widths.equal else allowed))
        shapes += [
            shape for key, value in pairs if (shape := KVShape(heads, key, value)).kv_width < trained.kv_width
        ]
    return shapes


class Frontier:
    """Least predicted KL, and the layer plans that reach it, for every number of cached numbers per token.

    Attributes:
        most: cached numbers per token of the trained model, all layers.
    """

    def __init__(self, layers: Sequence[LayerSensitivity], allowed: Sequence[Sequence[KVShape]]) -> None:
        """
        Args:
            layers: sensitivity of each layer.
            allowed: shapes that each layer can have.
        """
        self._options = [_undominated(layer, shapes) for layer, shapes in zip(layers, allowed, strict=True)]
        every = [plan.shape.kv_width for options in self._options for plan, _ in options]
        self._unit = math.gcd(*every)
        self.most = sum(layer.trained.kv_width for layer in layers)
        size = self.most // self._unit + 1
        least: NDArray[np.float64] = np.zeros(size)
        self._taken: list[NDArray[np.int16]] = []
        for options in self._options:
            extended, taken = np.full(size, np.inf), np.zeros(size, np.int16)
            for index, (plan, kl) in enumerate(options):
                cost = plan.shape.kv_width // self._unit
                shifted = least[: size - cost] + kl
                better = shifted < extended[cost:]
                extended[cost:][better] = shifted[better]
                taken[cost:][better] = index
            least = extended
            self._taken.append(taken)
        self._least = least

    @property
    def fewest(self) -> int:
        """Fewest cached numbers per token of any choice, all layers."""
        return int(np.isfinite(self._least).argmax()) * self._unit

    def kl(self, kv_width: int) -> float:
        """Least predicted KL, nats per token, for at most `kv_width` cached numbers per token, all layers."""
        return float(self._least[min(kv_width, self.most) // self._unit])

    def layer_plans(self, kv_width: int) -> list[LayerPlan]:
        """The plans of all layers that reach `kl(kv_width)`."""
        at, layer_plans = min(kv_width, self.most) // self._unit, []
        for options, taken in zip(reversed(self._options), reversed(self._taken), strict=True):
            plan, _ = options[taken[at]]
            layer_plans.append(plan)
            at -= plan.shape.kv_width // self._unit
        return layer_plans[::-1]

    def cheapest(self, kl: float) -> int:
        """Fewest cached numbers per token with a predicted KL of at most `kl` nats per token."""
        return int((self._least <= kl).argmax()) * self._unit


def _undominated(layer: LayerSensitivity, shapes: Sequence[KVShape]) -> list[tuple[LayerPlan, float]]:
    """Plans with their predicted KL, without those that are no better than another plan of the same size or
    smaller.
    """
    every = (LayerPlan(method, shape) for shape in shapes for method in layer.methods)
    options: list[tuple[LayerPlan, float]] = []
    for plan, kl in sorted(
        ((plan, layer.kl(plan)) for plan in every), key=lambda each: (each[0].shape.kv_width, each[1])
    ):
        if not options or kl < options[-1][1]:
            options.append((plan, kl))
    return options
