"""Largest magnitudes in a decoder's layers on calibration text, to find where float16 would overflow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer

TOKENS = 4096  # tokens measured: a sample, so users of the peaks must leave a margin


@dataclass(frozen=True)
class LayerPeaks:
    """Largest magnitudes in one layer.

    Attributes:
        cached: of cached keys and values.
        mlp: peaks of the outputs of the gate and up projections, and of the input and output of the down
            projection.
        residual: peaks of the residual stream after attention and after the layer.
    """

    cached: float
    mlp: float
    residual: float


class PeakMeter:
    """Runs layers one after another on calibration windows and records their peaks.

    Attributes:
        layers: peaks of the layers added so far.
        embedding: largest magnitude of the input of the first layer.
    """

    @torch.no_grad()
    def __init__(self, decoder: Decoder, windows: Tensor) -> None:
        """
        Args:
            decoder: the model whose layers are added.
            windows: token ids [N, S] int64; the first `TOKENS` tokens of them are used, one window at least.
        """
        self._rope = decoder.rope
        self._x = reference.embed(decoder.embedding, windows[: max(1, TOKENS // windows.shape[1])])
        self.embedding = _peak(self._x)
        self.layers: list[LayerPeaks] = []

    @torch.no_grad()
    def add_layer(self, layer: Layer) -> None:
        """Run the next layer and record its peaks."""
        positions = torch.arange(self._x.shape[1])[None]
        cached = mlp = residual = 0.0
        for window in self._x.split(1):  # a view: the stream advances in place
            normed = reference.norm(layer.attention_norm, window)
            mixed, key, value = reference.head_outputs(layer.attention, normed, positions, self._rope)
            window += reference.linear(layer.attention.o, mixed)
            residual = max(residual, _peak(window))
            normed = reference.norm(layer.mlp_norm, window)
            first = [
                reference.linear(each, normed) for each in (layer.mlp.gate, layer.mlp.up) if each is not None
            ]
            inner = reference.mlp_inner(layer.mlp, normed)
            update = reference.linear(layer.mlp.down, inner)
            window += update
            cached = max(cached, _peak(key), _peak(value))
            mlp = max(mlp, *map(_peak, first), _peak(inner), _peak(update))
            residual = max(residual, _peak(window))
        self.layers.append(LayerPeaks(cached, mlp, residual))


def _peak(x: Tensor) -> float:
    return float(x.abs().max())
