"""Quantisation of a whole model: all layers in turn, the embedding and the head."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvexport.convert.pipeline import ConvertedLayer, Refit, unconverted_layers
from kvexport.convert.streams import Streams
from kvexport.model.decoder import Decoder, Embedding, Layer, Linear, WeightCodes
from kvexport.model.lazy_table import row_parts
from kvexport.quantize.gptq import Factor
from kvexport.quantize.grid import Bits, Grid, dequantized_table, grid_for, round_to_nearest
from kvexport.quantize.inputs import LayerInputs
from kvexport.quantize.layers import WeightSettings, quantize_layer


class LayerQuantizer:
    """Quantises layer after layer in the streams of a conversion (`convert.pipeline.QuantizeLayer`)."""

    def __init__(self, settings: WeightSettings, eight_bits: Sequence[Collection[str]] | None = None) -> None:
        """
        Args:
            settings: format and method.
            eight_bits: of each layer, the names of linear maps (q, k, v, o, gate, up, down) that get 8 bits;
                None: none of them.
        """
        self._settings, self._eight_bits = settings, eight_bits

    def __call__(self, index: int, layer: Layer, streams: Streams, refit: Refit | None = None) -> Layer:
        """The layer with its weights quantised, and W_O refitted before if there is a refit."""
        quantized_stream, trained, attended = streams.before_layer()
        inputs = LayerInputs(quantized_stream, streams.train, trained, attended)
        return quantize_layer(layer, self._settings, inputs, eight_bits=self._names(index), refit=refit)

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


def quantize_embedding(embedding: Embedding, bits: Bits, block: int, dtype: torch.dtype) -> Embedding:
    """The embedding with its table in codes: int8 with a scale per row, or int4 in blocks along the hidden
    size; rounded to nearest.

    Args:
        embedding: the embedding, whose table is [vocab, width].
        bits: 4 or 8.
        block: largest block in 4 bits.
        dtype: data type of computation, to which scales are rounded.

    Raises:
        KvexportError: a weight is not finite, or would be infinite in the data type.
    """
    codes = _table_codes(embedding.weight, grid_for(embedding.weight.shape[1], bits, block), dtype)
    return replace(embedding, weight=dequantized_table(codes), codes=codes)


def quantize_head(
    head: Linear, bits: Bits, block: int, dtype: torch.dtype, second: Tensor | None = None
) -> Linear:
    """The head in codes: int8 with a scale per row, or int4 with blocks along the hidden size.

    Args:
        head: the head, [vocab, hidden].
        bits: 4 or 8.
        block: largest block in 4 bits.
        dtype: data type of computation, to which scales are rounded.
        second: second moments of its inputs, [hidden, hidden], for GPTQ; None: round to nearest.

    Raises:
        KvexportError: weights or moments are not finite, or a weight would be infinite in the data type.
    """
    codes = _table_codes(head.weight, grid_for(head.weight.shape[1], bits, block), dtype, second)
    return replace(head, weight=dequantized_table(codes), codes=codes)


def _table_codes(table: Tensor, grid: Grid, dtype: torch.dtype, second: Tensor | None = None) -> WeightCodes:
    """Codes of a table [rows, width], chosen for some rows at a time."""
    factor = None if second is None else Factor(second)
    parts = [
        round_to_nearest(rows, grid.bits, grid.block, dtype)
        if factor is None
        else factor.codes(rows, grid, dtype)
        for rows in row_parts(table)
    ]
    codes, scales = (torch.cat([getattr(each, name) for each in parts]) for name in ("codes", "scales"))
    return WeightCodes(codes, scales, grid.bits)
