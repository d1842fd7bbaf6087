"""Quantisation of a model's layers in turn."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvexport.convert.pipeline import ConvertedLayer, unconverted_layers
from kvexport.convert.streams import Streams
from kvexport.model.decoder import Decoder, Layer
from kvexport.quantize.inputs import LayerInputs
from kvexport.quantize.layers import WeightSettings, quantize_layer


class LayerQuantizer:
    """Quantises layer after layer in the streams of a conversion."""

    def __init__(self, settings: WeightSettings, eight_bits: Sequence[Collection[str]] | None = None) -> None:
        """
        Args:
            settings: format and method.
            eight_bits: of each layer, the names of linear maps (q, k, v, o, gate, up, down) that get 8 bits;
                None: none of them.
        """
        self._settings, self._eight_bits = settings, eight_bits

    def __call__(self, index: int, layer: Layer, streams: Streams) -> Layer:
        """The layer with its weights quantised; the trained attention of the streams has run."""
        quantized_stream, trained, attended = streams.before_layer()
        inputs = LayerInputs(quantized_stream, streams.train, trained, attended)
        return quantize_layer(layer, self._settings, inputs, eight_bits=self._names(index))

    def without_inputs(self, index: int, layer: Layer) -> Layer:
        """The layer with its weights rounded to nearest, which needs no calibration."""
        settings = replace(self._settings, method="nearest", ridge=None)
        return quantize_layer(layer, settings, eight_bits=self._names(index))

    def _names(self, index: int) -> Collection[str]:
        return () if self._eight_bits is None else self._eight_bits[index]


def quantize_layers(
    decoder: Decoder, windows: Tensor | None, quantizer: LayerQuantizer
) -> Iterator[ConvertedLayer]:
    """Quantise the layers of a model that is not compressed, one in memory at a time.

    Args:
        decoder: the trained model.
        windows: calibration tokens [N, length] int64, of which the last eighth is held out; None: weights are
            rounded to nearest, whatever the method.
        quantizer: quantises a layer.
    """
    streams = None if windows is None else _Streams(decoder, windows)
    for each in unconverted_layers(decoder):
        if streams is None:
            yield replace(each, layer=quantizer.without_inputs(each.index, each.layer))
        else:
            yield streams.quantize(each, quantizer)


class _Streams:
    """The streams of `quantize_layers`."""

    def __init__(self, decoder: Decoder, windows: Tensor) -> None:
        self._streams = Streams(decoder, windows)

    @torch.no_grad()  # on the generator it would hold while the caller computes
    def quantize(self, each: ConvertedLayer, quantizer: LayerQuantizer) -> ConvertedLayer:
        self._streams.attend(each.layer)
        layer = quantizer(each.index, each.layer, self._streams)
        error = self._streams.advance_both(each.layer, layer)
        return replace(each, layer=layer, report=replace(each.report, residual_error=error))
