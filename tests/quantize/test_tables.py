"""Quantisation of the embedding and of the head."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.decoders import make_decoder

from kvexport.model import lazy_table, reference
from kvexport.model.decoder import Linear
from kvexport.quantize.grid import Grid, dequantize, round_to_nearest
from kvexport.quantize.layers import WeightSettings
from kvexport.quantize.tables import quantize_embedding, quantize_head, quantize_tables, table_codes

SMALL = {"hidden": 64, "heads": 4, "head_dim": 16, "layers": 1, "dtype": torch.float32}
SINGLE, HALF = WeightSettings(block=32), WeightSettings(block=32, dtype=torch.float16)


def inputs() -> torch.Tensor:
    """Inputs of a head, [200, 64], whose channels are correlated."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(200, 64, generator=generator) @ torch.randn(64, 64, generator=generator)


def moments() -> torch.Tensor:
    x = inputs().double()
    return x.T @ x / len(x)


def test_embedding_and_head() -> None:
    decoder = make_decoder("llama", **SMALL)
    weight = decoder.embedding.weight
    for bits, blocks in ((8, 1), (4, 2)):
        table = quantize_embedding(decoder.embedding, bits, HALF)
        codes = table.codes
        assert torch.equal(table.weight, dequantize(codes))
        assert codes.scales.shape == (len(weight), blocks)
        assert torch.equal(codes.codes, round_to_nearest(weight, bits, 64 // blocks, torch.float16).codes)
    x = inputs()
    head = Linear(weight)

    def error(found: Linear) -> float:
        assert torch.equal(found.weight, dequantize(found.codes))
        return float((reference.linear(found, x) - reference.linear(head, x)).square().mean())

    nearest = quantize_head(head, 4, SINGLE)
    assert error(quantize_head(head, 4, SINGLE, moments())) < 0.8 * error(nearest)
    assert error(quantize_head(head, 8, SINGLE)) < 0.02 * error(nearest)


def test_rows_of_a_table_are_quantised_independently(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(2))
    whole = table_codes(weight, Grid(4, 32), SINGLE, moments())
    some = table_codes(weight[[3, 90]], Grid(4, 32), SINGLE, moments())
    monkeypatch.setattr(lazy_table, "_PART_BYTES", 40 * 64 * 4)
    in_parts = table_codes(weight, Grid(4, 32), SINGLE, moments())
    assert torch.equal(whole.codes, in_parts.codes) and torch.equal(whole.scales, in_parts.scales)
    assert torch.equal(whole.codes[[3, 90]], some.codes)


def test_a_tied_table_stays_one_if_the_bits_are_equal() -> None:
    decoder = dataclasses.replace(make_decoder("llama", **SMALL), head=None)
    one = quantize_tables(decoder, 4, 4, SINGLE, moments())
    assert one.head is None and one.embedding.codes is not None and one.embedding.codes.bits == 4
    as_head = quantize_head(Linear(decoder.embedding.weight), 4, SINGLE, moments())
    assert torch.equal(one.output.weight, as_head.weight)
    for head, embedding in ((8, 4), (4, None), (None, 8)):
        two = quantize_tables(decoder, head, embedding, SINGLE)
        assert two.head is not None
        bits = [None if each.codes is None else each.codes.bits for each in (two.head, two.embedding)]
        assert bits == [head, embedding]
    assert quantize_tables(decoder, None, None, SINGLE) is decoder
