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
from kvexport.calibrate import windows as attention_windows
from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer, Linear
from kvexport.model.divergence import Divergence, DivergenceMeter
from kvexport.quantize import WeightSettings, quantize_embedding, quantize_head, quantize_layer
from kvexport.quantize.inputs import PARTS, linears_of


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

    @property
    def any_integers(self) -> bool:
        """Whether any weight is quantised."""
        return bool({self.layers, self.embedding, self.head} & {*INTEGERS})


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
    """Quantises layers as they arrive, and runs them and their originals over held-out windows.

    Attributes:
        decoder: the model with its embedding and head quantised; its layers are the original's.
    """

    def __init__(self, decoder: Decoder, formats: WeightFormats, windows: Tensor, dtype: str) -> None:
        """
        Args:
            decoder: the trained model.
            formats: of the weights.
            windows: held-out tokens [N, length] int64.
            dtype: data type of computation.
        """
        self._original, self._windows = decoder, windows
        self._formats, self._dtype = formats, getattr(torch, dtype)
        self.decoder = self._with_tables(decoder)
        with torch.no_grad():
            self._streams = [reference.embed(each.embedding, windows) for each in (decoder, self.decoder)]

    @torch.no_grad()
    def quantize(self, layer: Layer) -> Layer:
        """The next layer with its linear maps in their format."""
        quantized = layer
        if self._formats.layers in INTEGERS:
            settings = WeightSettings(
                bits=4 if self._formats.layers == "int4" else 8,
                block=self._formats.block,
                dtype=self._dtype,
                method="nearest",
                ridge=None,
            )
            quantized = quantize_layer(layer, settings, eight_bits=self._in_eight_bits(layer))
        for each, x in zip((layer, quantized), self._streams, strict=True):
            attention_windows.advance(each, x)
        return quantized

    @torch.no_grad()
    def divergence(self) -> Divergence:
        """The divergence of the quantised model from the model in float, after the last layer."""
        meter = DivergenceMeter()
        for window, before, after in zip(self._windows, *self._streams, strict=True):
            logits = (
                reference.logits(self._original, before[None]),
                reference.logits(self.decoder, after[None]),
            )
            meter.add(*logits, window[None])
        return meter.finish()

    def _in_eight_bits(self, layer: Layer) -> set[str]:
        """Names of the linear maps that int4 cannot store."""
        maps = {name: each for part in PARTS for name, each in linears_of(layer, part).items()}
        return {name for name, each in maps.items() if self._bits("int4", each.weight) == 8}

    def _with_tables(self, decoder: Decoder) -> Decoder:
        formats, block, dtype = self._formats, self._formats.block, self._dtype
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
        return 4 if weight_format(name, rows, columns, self._formats.block).format == "int4" else 8
