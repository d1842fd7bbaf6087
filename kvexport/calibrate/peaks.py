"""The largest numbers that a decoder's layers make on calibration text: what float16 must be able to hold.

Knows where in a layer numbers grow large (the gated product, the residual stream); must not know what is done about it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer

TOKENS = 4096  # of calibration text: a sample, so whoever reads the peaks must leave room above them


@dataclass(frozen=True)
class LayerPeaks:
    """Largest magnitudes in one layer."""

    cached: float  # keys and values, as the cache holds them
    mlp: float  # what the MLP's first matrices give, what enters its last one and what leaves it
    residual: float  # the stream, after attention and after the layer


class PeakMeter:
    """Runs layers, as they pass, on whole windows of calibration tokens [N, S], TOKENS of them or fewer.

    Attributes:
        layers: the peaks of the layers so far.
        embedding: the largest number that enters the first layer.
    """

    @torch.no_grad()
    def __init__(self, decoder: Decoder, windows: Tensor) -> None:
        self._rope = decoder.rope
        self._x = reference.embed(decoder.embedding, windows[: max(1, TOKENS // windows.shape[1])])
        self.embedding = _peak(self._x)
        self.layers: list[LayerPeaks] = []

    @torch.no_grad()
    def add_layer(self, layer: Layer) -> None:
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
