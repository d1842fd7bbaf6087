"""Attention maps compared with attention computed pair by pair, and their coding."""

from __future__ import annotations

import base64
import dataclasses
import math

import pytest
import torch
from support.analyses import mean_pooled
from support.decoders import STYLES, make_attention, make_decoder, random_inputs, random_windows
from torch import Tensor

from kvexport.analyze.maps import MapRecorder, attention_map, head_places, packed, parse_pairs
from kvexport.errors import UsageError
from kvexport.model import reference
from kvexport.model.decoder import Attention, Layer, Linear

ORDER = (2, 0, 3, 1)


@pytest.mark.parametrize("style", STYLES)
def test_maps_equal_attention_pair_by_pair(style: str) -> None:
    attention = make_attention(style, sharpness=2.0)
    x = random_inputs(1, 9)
    found = attention_map(attention, x)[0]
    projected = reference.project(attention, x, torch.arange(9)[None])
    query, key = projected.query_rotated[0], projected.key_rotated[0]
    for head in range(attention.num_heads):
        for m in range(9):
            seen = [n for n in range(m + 1) if attention.window is None or m - n < attention.window]
            slope = 0.0 if attention.alibi_slopes is None else float(attention.alibi_slopes[head])
            shared = key[head // attention.queries_per_kv_head]
            powers = [
                math.exp(attention.scale * float(query[head, m] @ shared[n]) - slope * (m - n)) for n in seen
            ]
            wanted = torch.zeros(9, dtype=torch.float64)
            wanted[seen] = torch.tensor(powers, dtype=torch.float64) / sum(powers)
            torch.testing.assert_close(found[head, m], wanted)


def reordered(layer: Layer) -> Layer:
    """The same layer with its heads in another order."""
    attention = layer.attention

    def rows(linear: Linear) -> Linear:
        return Linear(torch.cat([linear.weight.unflatten(0, (len(ORDER), -1))[head] for head in ORDER]))

    columns = attention.o.weight.unflatten(1, (len(ORDER), -1))
    o = Linear(torch.cat([columns[:, head] for head in ORDER], dim=1))
    moved = dataclasses.replace(attention, q=rows(attention.q), k=rows(attention.k), v=rows(attention.v), o=o)
    return dataclasses.replace(layer, attention=moved)


def test_each_model_runs_on_its_own_stream_with_heads_in_trained_order() -> None:
    decoder = make_decoder(layers=3, sharpness=2.0)
    window = random_windows(decoder, 1, 10)[0]
    recorder = MapRecorder(decoder, window)
    for layer in decoder.layers:
        recorder.add(layer, reordered(layer))
    maps = recorder.finish()
    x = reference.embed(decoder.embedding, window[None])
    for layer, original, compressed in zip(decoder.layers, maps.original, maps.compressed, strict=True):
        wanted = attention_map(layer.attention, reference.norm(layer.attention_norm, x))[0]
        torch.testing.assert_close(original, wanted)
        torch.testing.assert_close(compressed, wanted)
        moved = attention_map(reordered(layer).attention, reference.norm(layer.attention_norm, x))[0]
        assert not torch.allclose(moved, wanted, atol=0.01)  # so the order was put right
        x = reference.run_layer(layer, x, torch.arange(10)[None]).residual
    assert max(max(heads) for heads in maps.distance()) < 1e-12


def test_maps_include_errors_of_earlier_layers() -> None:
    decoder = make_decoder(layers=2, sharpness=2.0)
    recorder = MapRecorder(decoder, random_windows(decoder, 1, 10)[0])
    first, second = decoder.layers
    recorder.add(first, dataclasses.replace(first, attention=mean_pooled(first.attention)))
    recorder.add(second, second)
    maps = recorder.finish()
    assert min(maps.distance()[1]) > 0.01
    original, compressed = maps.weights(7, 3)
    assert original[1] == maps.original[1][:, 7, 3].tolist()
    assert compressed[0] == maps.compressed[0][:, 7, 3].tolist()
    torch.testing.assert_close(maps.compressed[1].sum(-1), torch.ones(4, 10, dtype=torch.float64))


@pytest.mark.parametrize("width", [4, 8, 16])
def test_finds_heads_after_compression_and_reordering(width: int) -> None:
    attention: Attention = make_attention(heads=6, hidden=48)
    order = [4, 1, 5, 0, 2, 3]
    generator = torch.Generator().manual_seed(0)
    rows = attention.q.weight.unflatten(0, (6, -1))
    coded = [torch.randn(width, 8, generator=generator, dtype=torch.float64) @ rows[head] for head in order]
    noise = [0.05 * torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in coded]
    for parts in (coded, [a + b for a, b in zip(coded, noise, strict=True)]):
        converted = dataclasses.replace(attention, q=Linear(torch.cat(parts)))
        assert [order[place] for place in head_places(attention, converted)] == list(range(6))


def unpacked(text: str, tokens: int) -> Tensor:
    codes = list(base64.b64decode(text))
    rows = [
        [(codes[m * (m + 1) // 2 + n] / 255) ** 2 if n <= m else 0.0 for n in range(tokens)]
        for m in range(tokens)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def test_packed_maps_are_within_the_stated_error() -> None:
    attention = make_attention(sharpness=3.0)
    maps = attention_map(attention, random_inputs(1, 12))[0]
    for text, wanted in zip(packed(maps), maps, strict=True):
        assert float((unpacked(text, 12) - wanted).abs().max()) < 0.004
        assert len(base64.b64decode(text)) == 12 * 13 // 2


def test_parses_pairs() -> None:
    assert parse_pairs("12:3, 20:4,0:0", 21) == [(12, 3), (20, 4), (0, 0)]


@pytest.mark.parametrize(
    "text",
    ["", "3", "3:", ":3", "3:4:5", "a:1", "4;1", "-1:-2", "4.0:1", "³:1", "1:2", "21:0", "9" * 40 + ":1"],
)
def test_rejects_invalid_pairs(text: str) -> None:
    with pytest.raises(UsageError, match="--pairs"):
        parse_pairs(text, 21)
