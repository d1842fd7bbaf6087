"""Decoders with quantised weights, rounded to nearest."""

from __future__ import annotations

import dataclasses

import torch

from kvexport.bundle.formats import WeightFormat, weight_format
from kvexport.model.decoder import Decoder, Layer, Linear, WeightCodes
from kvexport.quantize.grid import quantized, round_to_nearest


def codes_of(weight: torch.Tensor, name: str, block: int, dtype: str) -> WeightCodes | None:
    """The codes of a weight [out, in] in the format that a build gives it; None: it stays in float."""
    rows, columns = weight.shape
    chosen = weight_format(name, rows, columns, block)
    return round_to_format(weight, chosen, dtype) if chosen.is_integer else None


def round_to_format(weight: torch.Tensor, chosen: WeightFormat, dtype: str = "float32") -> WeightCodes:
    bits = 4 if chosen.format == "int4" else 8
    return round_to_nearest(weight, bits, chosen.block, getattr(torch, dtype))  # type: ignore[arg-type]


def quantize_linear(linear: Linear, name: str, block: int, dtype: str = "float32") -> Linear:
    codes = codes_of(linear.weight, name, block, dtype)
    return linear if codes is None else quantized(linear, codes)


def quantize_layer(layer: Layer, name: str, block: int, dtype: str = "float32") -> Layer:
    """The layer with its linear maps in a weight format."""

    def each(part: object) -> object:
        return quantize_linear(part, name, block, dtype) if isinstance(part, Linear) else part

    def within(part: object) -> object:
        fields = dataclasses.fields(part)  # type: ignore[arg-type]
        return dataclasses.replace(part, **{f.name: each(getattr(part, f.name)) for f in fields})  # type: ignore[type-var]

    return dataclasses.replace(layer, attention=within(layer.attention), mlp=within(layer.mlp))  # type: ignore[arg-type]


def quantize_decoder(
    decoder: Decoder, name: str, *, block: int = 32, dtype: str = "float32", head: str | None = None
) -> Decoder:
    """The decoder with layers, embedding and head in a weight format.

    Args:
        name: format of the layers and of the embedding.
        block: largest block of int4.
        dtype: of the scales.
        head: format of an untied head; None: `name`.
    """
    embedding = decoder.embedding
    table = quantize_linear(Linear(embedding.weight), name, block, dtype)
    return dataclasses.replace(
        decoder,
        embedding=dataclasses.replace(embedding, weight=table.weight, codes=table.codes),
        layers=[quantize_layer(layer, name, block, dtype) for layer in decoder.layers],
        head=None if decoder.head is None else quantize_linear(decoder.head, head or name, block, dtype),
    )
