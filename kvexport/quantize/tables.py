"""Quantisation of the embedding and of the head.

The embedding is rounded to nearest: each of its inputs is one row. The head, and a table that serves as both,
are quantised by GPTQ where second moments of the head's inputs are given.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvexport.model.decoder import Decoder, Embedding, Linear, WeightCodes
from kvexport.model.lazy_table import row_parts
from kvexport.quantize.gptq import Factor
from kvexport.quantize.grid import Bits, Grid, dequantized_table, grid_for, round_to_nearest
from kvexport.quantize.layers import WeightSettings


def quantize_tables(
    decoder: Decoder,
    head: Bits | None,
    embedding: Bits | None,
    settings: WeightSettings,
    second: Tensor | None = None,
) -> Decoder:
    """The decoder with its head and embedding in codes. A tied head stays tied if both have the same bits.

    Args:
        decoder: the model; a head that has codes already is left as it is.
        head: bits of the head; None: it stays in float.
        embedding: bits of the embedding; None: it stays in float.
        settings: block and data type.
        second: second moments of the head's inputs, [width, width], for GPTQ; None: round to nearest.

    Raises:
        KvexportError: weights or moments are not finite, or a weight would be infinite in the data type.
    """
    if decoder.head is None and head == embedding:
        if head is not None:
            table = quantize_head(Linear(decoder.embedding.weight), head, settings, second)
            found = replace(decoder.embedding, weight=table.weight, codes=table.codes)
            decoder = replace(decoder, embedding=found)
        return decoder
    output = Linear(decoder.embedding.weight) if decoder.head is None else decoder.head
    if head is not None and output.codes is None:
        output = quantize_head(output, head, settings, second)
    if embedding is not None:
        decoder = replace(decoder, embedding=quantize_embedding(decoder.embedding, embedding, settings))
    return replace(decoder, head=output)


def quantize_embedding(embedding: Embedding, bits: Bits, settings: WeightSettings) -> Embedding:
    """The embedding with its table in codes: int8 with a scale per row, or int4 in blocks along the hidden
    size; rounded to nearest.

    Args:
        embedding: the embedding, whose table is [vocab, width].
        bits: 4 or 8.
        settings: block and data type.

    Raises:
        KvexportError: a weight is not finite, or would be infinite in the data type.
    """
    codes = table_codes(embedding.weight, grid_for(embedding.weight, bits, settings.block), settings)
    return replace(embedding, weight=dequantized_table(codes), codes=codes)


def quantize_head(head: Linear, bits: Bits, settings: WeightSettings, second: Tensor | None = None) -> Linear:
    """The head in codes: int8 with a scale per row, or int4 with blocks along the hidden size.

    Args:
        head: the head, [vocab, width].
        bits: 4 or 8.
        settings: block and data type.
        second: second moments of its inputs, [width, width], for GPTQ; None: round to nearest.

    Raises:
        KvexportError: weights or moments are not finite, or a weight would be infinite in the data type.
    """
    codes = table_codes(head.weight, grid_for(head.weight, bits, settings.block), settings, second)
    return replace(head, weight=dequantized_table(codes), codes=codes)


def table_codes(
    weight: Tensor, grid: Grid, settings: WeightSettings, second: Tensor | None = None
) -> WeightCodes:
    """Codes of rows of a table [rows, width], chosen for some at a time; they do not depend on each other.
    Other arguments as `quantize_head`.

    Raises:
        KvexportError: as `quantize_head`.
    """
    factor = None if second is None else Factor(second, settings.damping)
    parts = [
        round_to_nearest(rows, grid.bits, grid.block, settings.dtype)
        if factor is None
        else factor.codes(rows, grid, settings.dtype)
        for rows in row_parts(weight)
    ]
    codes, scales = (torch.cat([getattr(each, name) for each in parts]) for name in ("codes", "scales"))
    return WeightCodes(codes, scales, grid.bits)
