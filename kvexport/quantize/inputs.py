"""Inputs of a layer's linear maps over calibration windows, and their second moments.

A layer has four groups of linear maps that share their inputs: "qkv", "o", "gate_up" and "down". The inputs
of each are computed with the maps before it as they are in the given layer: quantised, if they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from kvexport.calibrate import windows as attention_windows
from kvexport.model import reference
from kvexport.model.decoder import Layer, Linear

Part = Literal["qkv", "o", "gate_up", "down"]
PARTS: tuple[Part, ...] = ("qkv", "o", "gate_up", "down")
WIDE = 8192  # inputs up to which moments are summed and factorised in float64; beyond, in float32


def linears_of(layer: Layer, part: Part) -> dict[str, Linear]:
    """The linear maps of a part, by their names in `Attention` or `Mlp`."""
    attention, mlp = layer.attention, layer.mlp
    if part == "qkv":
        return {"q": attention.q, "k": attention.k, "v": attention.v}
    if part == "o":
        return {"o": attention.o}
    if part == "down":
        return {"down": mlp.down}
    return {"up": mlp.up} if mlp.gate is None else {"gate": mlp.gate, "up": mlp.up}


class SecondMoments:
    """Sum of x xᵀ over inputs x."""

    def __init__(self, width: int, device: torch.device) -> None:
        dtype = torch.float64 if width <= WIDE else torch.float32
        self._sum = torch.zeros(width, width, dtype=dtype, device=device)
        self._count = 0

    def add(self, x: Tensor) -> None:
        """Add inputs x [..., width]."""
        rows = x.flatten(0, -2)
        self._count += len(rows)
        if rows.dtype == self._sum.dtype:
            self._sum.addmm_(rows.T, rows)
        else:
            rows = rows if rows.dtype == torch.float64 else rows.float()
            self._sum += rows.T @ rows

    def mean(self) -> Tensor:
        """E[x xᵀ], [width, width]."""
        return self._sum / max(self._count, 1)


class LayerInputs:
    """The residual stream before a layer over calibration windows, [N, S, hidden].

    What attention made of it is kept for the parts that follow, as long as `layer` has the same attention.
    """

    def __init__(self, residual: Tensor, windows: range) -> None:
        """
        Args:
            residual: the stream before the layer.
            windows: the windows that moments are taken over.
        """
        self._residual, self._windows = residual, windows

    def inputs(self, layer: Layer, part: Part) -> Iterator[Tensor]:
        """Inputs [B, S, width] of a part, in batches of windows."""
        for batch in attention_windows.batches(self._windows, self._residual.shape[1]):
            yield _inputs(layer, part, self._residual[batch])

    def second_moments(self, layer: Layer, part: Part) -> Tensor:
        """E[x xᵀ] of a part's inputs, [width, width]."""
        weight = next(iter(linears_of(layer, part).values())).weight
        moments = SecondMoments(weight.shape[1], weight.device)
        for x in self.inputs(layer, part):
            moments.add(x)
        return moments.mean()


def _inputs(layer: Layer, part: Part, x: Tensor) -> Tensor:
    attention = layer.attention
    if part == "qkv":
        return reference.normed(layer.attention_norm, x)

    def heads(inner: Tensor) -> Tensor:
        return attention_windows.head_outputs(attention, attention_windows.project(attention, inner))

    if part == "o":
        return heads(reference.normed(layer.attention_norm, x))
    found: list[Tensor] = []

    def feed(mlp: object, inner: Tensor) -> Tensor:
        found.append(inner if part == "gate_up" else reference.mlp_inner(layer.mlp, inner))
        return torch.zeros_like(x)

    reference.run_block(layer, x, lambda inner: reference.linear(attention.o, heads(inner)), feed)
    return found[0]
