"""The converted decoder in float32 with trainable attention weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kvexport.heal.loss import advance, run_layer
from kvexport.heal.trainable import TrainableAttention, adapt
from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer, map_tensors

T = TypeVar("T")


class Student:
    """A converted decoder in training.

    Attributes:
        ends: embedding, final norm and head in float32.
        given: the layers in float32 with the given weights; `layer(i)` has the current ones.
    """

    def __init__(self, converted: Decoder, lora_rank: int | None, seed: int) -> None:
        self._converted, self._frugal = converted, lora_rank is not None
        self.ends = in_dtype(replace(converted, layers=[]), torch.float32)  # embedding, final norm and head
        self.given = [in_dtype(layer, torch.float32) for layer in converted.layers]
        self._trained = [TrainableAttention(layer.attention) for layer in self.given]
        if lora_rank is not None:
            adapt(self._trained, lora_rank, seed)

    def __len__(self) -> int:
        return len(self.given)

    def scaled_parameters(self, index: int | None = None) -> list[tuple[nn.Parameter, float]]:
        """Trained parameters of one layer or of all, each with the RMS that its steps are relative to."""
        chosen = self._trained if index is None else [self._trained[index]]
        return [pair for layer in chosen for pair in layer.scaled_parameters()]

    def layer(self, index: int) -> Layer:
        """One layer with the current weights."""
        return replace(self.given[index], attention=self._trained[index].attention())

    def stream(self, ids: Tensor) -> Tensor:
        """Residual stream after the last layer [B, S, hidden], differentiable.

        With adapters, activations and sums of weight and adapter are recomputed in the backward pass.
        """
        x = reference.embed(self.ends.embedding, ids)
        for index in range(len(self)):
            if self._frugal:  # nothing random is computed
                x = checkpoint(self._run, index, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self._run(index, x)
        return x

    def _run(self, index: int, x: Tensor) -> Tensor:
        return run_layer(self.layer(index), x)

    @torch.no_grad()
    def held_out_stream(self, ids: Tensor, layers: Sequence[Layer] | None = None) -> Tensor:
        """Residual stream after the last layer [M, S, hidden], with the current weights or with `layers`."""
        x = reference.embed(self.ends.embedding, ids)
        for index in range(len(self)):
            advance(self.layer(index) if layers is None else layers[index], x)
        return x

    @torch.no_grad()
    def decoder(self) -> Decoder:
        """The given decoder, in its shapes and dtypes, with the current attention weights."""
        layers = []
        for index, layer in enumerate(self._converted.layers):
            attention = in_dtype(self._trained[index].attention(), layer.attention.q.weight.dtype)
            layers.append(replace(layer, attention=attention))
        return replace(self._converted, layers=layers)


def in_dtype(part: T, dtype: torch.dtype) -> T:
    """A tree of dataclasses with every floating-point tensor detached and in `dtype`."""
    return map_tensors(
        part, lambda tensor: tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
    )
