"""The graph equals the reference for random shapes."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.blocks import NORMS
from support.graph_decoders import LLAMA, Shape, Style, disagreement, make_decoder, open_session, write

EVEN = st.integers(1, 6).map(lambda half: 2 * half)


@st.composite
def shapes(draw: st.DrawFn, head_dim: int, alibi: bool) -> Shape:
    kv_heads = draw(st.integers(1, 3))
    group = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 4))
    mapped = group > 1 or draw(st.booleans())
    return Shape(
        heads,
        kv_heads,
        head_dim,
        group,
        key_dim=draw(st.integers(1, 12)) if mapped else None,
        value_dim=draw(st.none() | st.integers(1, 12)),
        value_map=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 12)),
        qk_norm=draw(st.booleans()),
        slopes=tuple(draw(st.lists(st.floats(0.001, 1), min_size=heads, max_size=heads))) if alibi else None,
    )


@st.composite
def decoders(draw: st.DrawFn) -> tuple[list[Shape], Style]:
    alibi, head_dim = draw(st.booleans()), draw(EVEN)
    style = dataclasses.replace(
        LLAMA,
        norm=draw(st.sampled_from(("rms", "layer"))),
        qkv_bias=draw(st.booleans()),
        other_bias=draw(st.booleans()),
        gated=draw(st.booleans()),
        activation=draw(st.sampled_from(("silu", "gelu", "gelu_tanh", "relu", "relu_squared"))),
        rope=not alibi,
        tied=draw(st.booleans()),
        embedding_norm=draw(st.booleans()),
        norms=tuple(sorted(draw(st.sets(st.sampled_from(NORMS))))),
        parallel=draw(st.booleans()),
        residual_multiplier=draw(st.sampled_from((1.0, 0.3))),
        clip=draw(st.sampled_from((None, 0.5))),
        softcap=draw(st.sampled_from((None, 0.8))),
    )
    return draw(st.lists(shapes(head_dim, alibi), min_size=1, max_size=3)), style


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Prompt lengths of a batch, and the chunks of the longest prompt."""
    lengths = draw(st.lists(st.integers(1, 10), min_size=1, max_size=3))
    left, chunks = max(lengths), list[int]()
    while left:
        chunks.append(draw(st.integers(1, left)))
        left -= chunks[-1]
    return lengths, chunks


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(decoders(), prompts(), st.integers(0, 5), st.integers(0, 4))
def test_graph_equals_the_reference(
    described: tuple[list[Shape], Style], prompt: tuple[list[int], list[int]], steps: int, spare: int
) -> None:
    layers, style = described
    lengths, chunks = prompt
    decoder = make_decoder(layers, style)
    with tempfile.TemporaryDirectory() as folder:
        contract = write(decoder, Path(folder))
        session = open_session(Path(folder))
        slots = max(lengths) + steps + spare
        found = disagreement(
            decoder, session, contract, lengths=lengths, chunks=chunks, steps=steps, slots=slots, fill=100.0
        )
    assert found < 1e-5
