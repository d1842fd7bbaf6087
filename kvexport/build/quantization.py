"""Quantisation of the weights that a build writes, and what it costs.

The cost is the divergence of the quantised model from the same model in float, after compression: it is
measured apart from what compression costs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kvexport.build.options import BuildOptions
from kvexport.bundle.formats import INTEGERS, default_block, weight_format
from kvexport.convert import split_windows
from kvexport.convert.streams import Streams
from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer, Linear
from kvexport.model.divergence import Divergence, DivergenceMeter
from kvexport.model.placement import CPU, move, place
from kvexport.quantize.inputs import PARTS, linears_of
from kvexport.quantize.layers import WeightSettings
from kvexport.quantize.method_names import DEFAULT, Method
from kvexport.quantize.model import LayerQuantizer, quantize_embedding, quantize_head


@dataclass(frozen=True)
class WeightFormats:
    """The names of the formats that weights are to be stored in; a name that is no integer format is the
    dtype.

    Attributes:
        layers, embedding, head: names of formats.
        block: largest block of int4.
    """

    layers: str
    embedding: str
    head: str
    block: int


def requested_formats(options: BuildOptions, decoder: Decoder) -> WeightFormats:
    """The formats that the options ask for.

    By default head and embedding are stored as the layers, and an embedding to which the head is tied as the
    head.
    """
    layers = options.weights or options.dtype
    tied = decoder.head is None
    head = options.head_weights or (options.embedding_weights if tied else None) or layers
    embedding = options.embedding_weights or (head if tied else layers)
    block = options.weight_block or default_block(decoder.dims.hidden_size)
    return WeightFormats(layers, embedding, head, block)


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
        dtype: str,
        *,
        method: Method = DEFAULT,
        device: torch.device | None = None,
    ) -> None:
        """
        Args:
            decoder: the trained model, on the CPU.
            formats: of the weights.
            windows: calibration tokens [N, length] int64, of which the last eighth is held out.
            dtype: data type of computation.
            method: how codes are chosen.
            device: device that computes [default: the CPU].
        """
        self._original, self._formats = decoder, formats
        self._settings = WeightSettings(
            bits=4 if formats.layers == "int4" else 8,
            block=formats.block,
            dtype=getattr(torch, dtype),
            method=method,
        )
        self._device = device or torch.device(CPU)
        self._held_out = split_windows(len(windows))[1]
        if method == "nearest":  # the others are not needed
            windows = windows[self._held_out]
            self._held_out = range(len(windows))
        self._windows = windows
        self.decoder = self._with_tables(decoder)
        embedding = move(self.decoder.embedding, self._device)
        self._streams = Streams(place(decoder, self._device), windows, embedding)

    @torch.no_grad()
    def quantize(self, layer: Layer) -> Layer:
        """The next layer, on the CPU, with its linear maps in their format."""
        layer, streams = move(layer, self._device), self._streams
        streams.attend(layer)
        quantized = layer
        if self._formats.layers in INTEGERS:
            quantizer = LayerQuantizer(self._settings, [self._in_eight_bits(layer)])
            if self._settings.method == "nearest":
                quantized = quantizer.without_inputs(0, layer)
            else:
                quantized = quantizer(0, layer, streams)
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

    def _in_eight_bits(self, layer: Layer) -> set[str]:
        """Names of the linear maps that int4 cannot store."""
        maps = {name: each for part in PARTS for name, each in linears_of(layer, part).items()}
        return {name for name, each in maps.items() if self._bits("int4", each.weight) == 8}

    def _with_tables(self, decoder: Decoder) -> Decoder:
        formats, block, dtype = self._formats, self._settings.block, self._settings.dtype
        embedding, head = decoder.embedding, decoder.head
        if head is None and formats.head != formats.embedding:
            head = Linear(embedding.weight)  # two tables
        if head is not None and formats.head in INTEGERS:
            head = quantize_head(head, self._bits(formats.head, head.weight), block, dtype)
        if formats.embedding in INTEGERS:
            bits: Literal[4, 8] = 4 if formats.embedding == "int4" else 8
            embedding = quantize_embedding(embedding, bits, block, dtype)
        return replace(decoder, embedding=embedding, head=head)

    def _bits(self, name: str, weight: Tensor) -> Literal[4, 8]:
        rows, columns = weight.shape
        return 4 if weight_format(name, rows, columns, self._settings.block).format == "int4" else 8
