"""Largest magnitudes in a decoder's layers on calibration text, to find where float16 would overflow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer, Mlp

PEAK_TOKENS = 4096  # tokens measured: a sample, so users of the peaks must leave a margin


@dataclass(frozen=True)
class LayerPeaks:
    """Largest magnitudes in one layer.

    Attributes:
        cached: peaks of cached keys and values, and of a residual stream that they are computed from without
            a norm.
        mlp: peaks of the MLP's input, of the outputs of the gate and up projections, and of the input and
            output of the down projection.
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
            windows: token ids [N, S] int64; their first `PEAK_TOKENS` tokens are used, one window at least.
        """
        self._x = reference.embed(decoder.embedding, windows[: max(1, PEAK_TOKENS // windows.shape[1])])
        self.embedding = _peak(self._x)
        self.layers: list[LayerPeaks] = []

    @torch.no_grad()
    def add_layer(self, layer: Layer) -> None:
        """Run the next layer and record its peaks."""
        positions = torch.arange(self._x.shape[1], device=self._x.device)[None]
        cached = mlp = residual = 0.0

        def feed(parameters: Mlp, x: Tensor) -> Tensor:
            nonlocal mlp, residual
            first = (
                reference.linear(each, x) for each in (parameters.gate, parameters.up) if each is not None
            )
            inner = reference.mlp_inner(parameters, x)
            update = reference.linear(parameters.down, inner)
            mlp = max(mlp, _peak(x), *map(_peak, first), _peak(inner), _peak(update))
            if layer.mlp_residual_norm is not None:  # which makes the sum with `update` small again
                residual = max(residual, _peak(update))
            return update

        for window in self._x.split(1):  # a view: the stream advances in place
            if layer.attention_norm is None:
                cached = max(cached, _peak(window))
            taps = reference.run_layer(layer, window, positions, feed=feed)
            cached = max(cached, _peak(taps.key), _peak(taps.value))
            residual = max(residual, _peak(window + taps.attention), _peak(taps.residual))
            window[:] = taps.residual
        self.layers.append(LayerPeaks(cached, mlp, residual))


def _peak(x: Tensor) -> float:
    return float(x.abs().max())
