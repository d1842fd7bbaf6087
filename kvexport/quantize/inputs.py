"""Inputs of a layer's linear maps over calibration windows, and their second moments.

A layer has four parts, whose linear maps share their inputs: "qkv", "o", "gate_up" and "down". The inputs of
each are computed with the parts before it as they are in the given layer: quantised, if they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from kvexport.calibrate import windows as attention_windows
from kvexport.model import reference
from kvexport.model.decoder import Attention, Layer, Linear, Mlp

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


def all_linears(layer: Layer) -> dict[str, Linear]:
    """The linear maps of all parts, by name."""
    return {name: linear for part in PARTS for name, linear in linears_of(layer, part).items()}


def with_linears(layer: Layer, part: Part, linears: Mapping[str, Linear]) -> Layer:
    """The layer with other linear maps in a part."""
    fields: dict[str, Any] = dict(linears)
    if part in ("qkv", "o"):
        return replace(layer, attention=replace(layer.attention, **fields))
    return replace(layer, mlp=replace(layer.mlp, **fields))


@dataclass(frozen=True)
class InputMoments:
    """Means over calibration tokens, for inputs x̂ of the quantised model and x of the trained one.

    Attributes:
        second: H = E[x̂ x̂ᵀ], [in, in].
        drift: E[(x - x̂) x̂ᵀ], [in, in]; None: there is no trained model to compare with.
    """

    second: Tensor
    drift: Tensor | None = None


class LayerInputs:
    """Residual streams before a layer, of the quantised and of the trained model, over calibration windows.

    Heads of the quantised attention are computed once, and kept for the parts that follow.
    """

    def __init__(
        self,
        quantized: Tensor,
        windows: range,
        trained: Tensor | None = None,
        attended: Tensor | None = None,
    ) -> None:
        """
        Args:
            quantized: residual stream of the quantised model before the layer, [N, S, hidden].
            windows: indices of the windows that moments are taken over.
            trained: residual stream of the trained model, same shape; None: moments have no drift.
            attended: output of the trained attention, same shape; needed with `trained`.
        """
        self._quantized, self._windows = quantized, windows
        self._trained, self._attended = trained, attended
        self._heads: tuple[Attention, dict[int, Tensor]] | None = None

    def moments(self, layer: Layer, part: Part, exact: Layer | None = None) -> InputMoments:
        """Moments of the inputs of a part.

        Args:
            layer: the layer, with the parts before this one as the quantised model has them.
            part: the part.
            exact: the same layer with no part quantised, which runs on the trained stream; None: no drift.
        """
        weight = next(iter(linears_of(layer, part).values())).weight
        width = weight.shape[1]
        second = Products(width, weight.device)
        drift = None if exact is None or self._trained is None else Products(width, weight.device)
        for batch in attention_windows.batches(self._windows, self._quantized.shape[1]):
            x = self._inputs(layer, part, batch)
            second.add(x, x)
            if drift is not None:
                assert exact is not None
                drift.add(self._trained_inputs(exact, part, batch) - x, x)
        return InputMoments(second.mean(), None if drift is None else drift.mean())

    def second_moments(self, layer: Layer, part: Part) -> Tensor:
        """E[x xᵀ] of the inputs x of a part in the quantised model, [in, in]."""
        return self.moments(layer, part).second

    def _inputs(self, layer: Layer, part: Part, batch: slice) -> Tensor:
        x = self._quantized[batch]
        if part == "qkv":
            return reference.normed(layer.attention_norm, x)
        heads = self._heads_of(layer, batch)
        if part == "o":
            return heads
        return _mlp_inputs(layer, part, x, reference.linear(layer.attention.o, heads))

    def _heads_of(self, layer: Layer, batch: slice) -> Tensor:
        """Head outputs of the quantised stream; they do not depend on `o`."""
        if self._heads is None or not _same_heads(self._heads[0], layer.attention):
            self._heads = layer.attention, {}
        kept = self._heads[1]
        if batch.start not in kept:
            kept[batch.start] = _heads(layer, self._quantized[batch])
        return kept[batch.start]

    def _trained_inputs(self, exact: Layer, part: Part, batch: slice) -> Tensor:
        assert self._trained is not None and self._attended is not None
        x = self._trained[batch]
        if part == "qkv":
            return reference.normed(exact.attention_norm, x)
        if part == "o":
            return _heads(exact, x)
        return _mlp_inputs(exact, part, x, self._attended[batch])


class Products:
    """Mean of x yᵀ over tokens."""

    def __init__(self, width: int, device: torch.device) -> None:
        dtype = torch.float64 if width <= WIDE else torch.float32
        self._sum = torch.zeros(width, width, dtype=dtype, device=device)
        self._count = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add vectors x and y [..., width]."""
        x, y = (each.flatten(0, -2) for each in (x, y))
        x, y = (each if each.dtype == torch.float64 else each.float() for each in (x, y))
        self._count += len(x)
        if x.dtype == self._sum.dtype:
            self._sum.addmm_(x.T, y)
        else:
            self._sum += x.T @ y

    def mean(self) -> Tensor:
        """[width, width]; the sum is used up."""
        return self._sum.div_(max(self._count, 1))


def _heads(layer: Layer, x: Tensor) -> Tensor:
    """Concatenated head outputs [B, S, H·width] of a residual stream [B, S, hidden]."""
    inner = reference.normed(layer.attention_norm, x)
    return attention_windows.head_outputs(layer.attention, attention_windows.project(layer.attention, inner))


def _same_heads(a: Attention, b: Attention) -> bool:
    return a.q is b.q and a.k is b.k and a.v is b.v


def _mlp_inputs(layer: Layer, part: Part, x: Tensor, attended: Tensor) -> Tensor:
    """Inputs of the MLP, or of its down projection, after an attention output [B, S, hidden]."""
    found: list[Tensor] = []

    def feed(mlp: Mlp, inner: Tensor) -> Tensor:
        found.append(inner if part == "gate_up" else reference.mlp_inner(mlp, inner))
        return torch.zeros_like(inner)

    reference.run_block(layer, x, lambda _: attended, feed)
    return found[0]
