"""Quantisation of the weights that a build writes, and what it costs.

The cost is the divergence of the quantised model from the same model in float, after compression: it is
measured apart from what compression costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvexport.build.options import BuildOptions
from kvexport.bundle.formats import INTEGERS, WeightFormats, resolve_formats
from kvexport.convert import split_windows
from kvexport.convert.streams import Streams
from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer
from kvexport.model.divergence import Divergence, DivergenceMeter
from kvexport.model.placement import CPU, move, place
from kvexport.quantize.grid import Bits
from kvexport.quantize.layers import WeightSettings
from kvexport.quantize.model import LayerQuantizer
from kvexport.quantize.tables import quantize_tables

_BITS: dict[str, Bits] = {"int4": 4, "int8": 8}


def requested_formats(options: BuildOptions, decoder: Decoder) -> WeightFormats:
    """The formats that the options ask for."""
    return resolve_formats(
        options.dtype,
        tied=decoder.head is None,
        hidden_size=decoder.dims.hidden_size,
        weights=options.weights,
        head_weights=options.head_weights,
        embedding_weights=options.embedding_weights,
        weight_block=options.weight_block,
    )


def weight_settings(options: BuildOptions, formats: WeightFormats) -> WeightSettings:
    """How the options ask to quantise weights."""
    return WeightSettings(
        bits=4 if formats.layers == "int4" else 8,
        block=formats.block,
        dtype=getattr(torch, options.dtype),
        method=options.weight_method,
    )


class WeightQuantization:
    """Quantises layers as they arrive from the conversion, in the streams of the model in float and of the
    quantised one.

    The codes of a layer are made for the inputs that the quantised layers before it give; all but "nearest"
    fit them on the calibration windows.

    Attributes:
        decoder: the model with its embedding and head quantised, on the CPU; its layers are the original's.
    """

    @torch.no_grad()
    def __init__(
        self,
        decoder: Decoder,
        formats: WeightFormats,
        windows: Tensor,
        settings: WeightSettings,
        *,
        head_inputs: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        """
        Args:
            decoder: the trained model, on the CPU.
            formats: of the weights.
            windows: calibration tokens [N, length] int64, of which the last eighth is held out.
            settings: how codes are chosen.
            head_inputs: second moments of the head's inputs, [width, width], for GPTQ; None: the head is
                rounded to nearest.
            device: device that computes [default: the CPU].
        """
        self._original, self._formats, self._settings = decoder, formats, settings
        self._quantizer, self._index = LayerQuantizer(settings, formats.eight_bits), 0
        self._device = device or torch.device(CPU)
        self._held_out = split_windows(len(windows))[1]
        if settings.method == "nearest":  # the others are not needed
            windows = windows[self._held_out]
            self._held_out = range(len(windows))
        self._windows = windows
        self.decoder = quantize_tables(
            decoder, _BITS.get(formats.head), _BITS.get(formats.embedding), settings, head_inputs
        )
        embedding = move(self.decoder.embedding, self._device)
        self._streams = Streams(place(decoder, self._device), windows, embedding)

    @torch.no_grad()
    def quantize(self, layer: Layer) -> Layer:
        """The next layer, on the CPU, with its linear maps in their format."""
        layer, streams = move(layer, self._device), self._streams
        streams.attend(layer)
        quantized = layer
        if self._formats.layers in INTEGERS:
            if self._settings.method == "nearest":
                quantized = self._quantizer.without_inputs(self._index, layer)
            else:
                quantized = self._quantizer(self._index, layer, streams)
        self._index += 1
        streams.advance_both(layer, quantized)
        return move(quantized, CPU)

    @torch.no_grad()
    def divergence(self) -> Divergence:
        """The divergence of the quantised model from the model in float on held-out windows, after the last
        layer.
        """
        meter, (after, before, _) = DivergenceMeter(), self._streams.before_layer()
        for at in self._held_out:
            one = slice(at, at + 1)
            logits = (
                reference.logits(self._original, before[one].to(CPU)),
                reference.logits(self.decoder, after[one].to(CPU)),
            )
            meter.add(*logits, self._windows[one])
        return meter.finish()
