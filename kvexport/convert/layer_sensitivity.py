"""Sensitivity of one layer: the KL that its conversion is predicted to cause, for every method and shape.

It is a property of the model, the calibration text and the capacity, not of a request for compression; so it
is measured once and used for every ratio.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvexport.convert.groups import KVShape
from kvexport.convert.methods import METHODS, LayerPlan, Method


@dataclass(frozen=True)
class Curves:
    """Losses of one layer with one method and group size, E|Δo|², summed over groups.

    Attributes:
        keys: loss of keys at widths 0 .. n = size·head_dim, [n + 1] float64.
        values: loss of values at the same widths, [n + 1] float64.
    """

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class LayerSensitivity:
    """Predicted loss of one layer for every method, group size and width.

    Attributes:
        trained: shape of its cache before conversion.
        sizes: group sizes, ascending.
        curves: losses by method and group size.
        output_power: E|o - ō|², power of the attention output about its mean.
        key_sensitivity: by method, mean KL in nats per token for a unit of loss of keys.
        value_sensitivity: mean KL in nats per token for a unit of loss of values.
    """

    trained: KVShape
    sizes: tuple[int, ...]
    curves: dict[tuple[Method, int], Curves]
    output_power: float
    key_sensitivity: dict[Method, float]
    value_sensitivity: float

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods that were analysed."""
        return tuple(self.key_sensitivity)

    def kl(self, layer_plan: LayerPlan) -> float:
        """Predicted mean KL, nats per token, if this layer alone is converted by the plan."""
        shape = layer_plan.shape
        if shape == self.trained:
            return 0.0
        curves = self.curves[layer_plan.method, self.trained.kv_heads // shape.kv_heads]
        kl_of_keys = self.key_sensitivity[layer_plan.method] * curves.keys[shape.key_dim]
        return float(kl_of_keys + self.value_sensitivity * curves.values[shape.value_dim])

    def tensors(self) -> dict[str, Tensor]:
        """The sensitivity as tensors to be saved, by name; methods are saved by their names."""
        saved = {
            "trained": torch.tensor([self.trained.kv_heads, self.trained.key_dim, self.trained.value_dim]),
            "sizes": torch.tensor(self.sizes),
            "output_power": torch.tensor(self.output_power, dtype=torch.float64),
            "value_sensitivity": torch.tensor(self.value_sensitivity, dtype=torch.float64),
        }
        for method, sensitivity in self.key_sensitivity.items():
            saved[f"key_sensitivity.{method.name}"] = torch.tensor(sensitivity, dtype=torch.float64)
        for (method, size), curves in self.curves.items():
            saved[f"keys.{method.name}.{size}"] = curves.keys
            saved[f"values.{method.name}.{size}"] = curves.values
        return saved

    @classmethod
    def from_tensors(cls, saved: Mapping[str, Tensor]) -> LayerSensitivity:
        """The sensitivity that `tensors` saved.

        Raises:
            KeyError: a tensor is missing.
        """
        sizes = tuple(int(size) for size in saved["sizes"])
        prefix = "key_sensitivity."
        key_sensitivity = {
            METHODS[name.removeprefix(prefix)]: float(value)
            for name, value in saved.items()
            if name.startswith(prefix)
        }
        curves = {
            (method, size): Curves(saved[f"keys.{method.name}.{size}"], saved[f"values.{method.name}.{size}"])
            for method in key_sensitivity
            for size in sizes
        }
        return cls(
            trained=KVShape(*(int(number) for number in saved["trained"])),
            sizes=sizes,
            curves=curves,
            output_power=float(saved["output_power"]),
            key_sensitivity=key_sensitivity,
            value_sensitivity=float(saved["value_sensitivity"]),
        )
