"""The graph on ONNX Runtime equals the PyTorch reference, for every family and form of attention."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from support.graph_decoders import (
    BLOOM,
    LLAMA,
    QWEN2,
    VOCAB,
    Caller,
    Shape,
    Style,
    disagreement,
    make_decoder,
    open_session,
    quiet,
    rounded,
    slopes_of,
    write,
)

from kvexport.graph import GRAPH_FILE, as_float32, with_taps
from kvexport.model import reference
from kvexport.model.decoder import Linear, Rope

ONLINE = Shape(heads=4, kv_heads=2, group=2, key_dim=8)
DECODERS = {
    "llama-mha": make_decoder([Shape(), Shape()]),
    "llama-mha-16": make_decoder([Shape(head_dim=16)] * 2),
    "llama-gqa-tied": make_decoder(
        [Shape(kv_heads=2), Shape(kv_heads=1)], dataclasses.replace(LLAMA, tied=True)
    ),
    "mistral-window": make_decoder(
        [Shape(kv_heads=2, window=3), Shape(kv_heads=2), Shape(kv_heads=2, window=3)]
    ),
    "qwen2": make_decoder([Shape(kv_heads=2), Shape(kv_heads=2)], QWEN2),
    "qwen3": make_decoder([Shape(kv_heads=2, qk_norm=True), Shape(kv_heads=2, qk_norm=True)]),
    "bloom": make_decoder([Shape(slopes=slopes_of(4))] * 2, BLOOM),
    "bloom-6-heads": make_decoder(
        [Shape(6, 6, slopes=slopes_of(6)), Shape(6, 2, slopes=slopes_of(6)[::-1])], BLOOM
    ),
    "bloom-window": make_decoder([Shape(slopes=slopes_of(4), window=4), Shape(slopes=slopes_of(4))], BLOOM),
    "gelu": make_decoder([Shape()], Style(gated=False, activation="gelu", other_bias=True)),
    "relu": make_decoder([Shape()], Style(gated=False, activation="relu")),
    "online": make_decoder([ONLINE, ONLINE]),
    "online-one-to-one": make_decoder([Shape(key_dim=4), Shape()]),
    "online-wide": make_decoder(
        [Shape(8, 1, group=8, key_dim=32, value_dim=24), Shape(8, 2, group=4, key_dim=16)]
    ),
    "online-qk-norm": make_decoder([dataclasses.replace(ONLINE, qk_norm=True, window=6)] * 2),
    "online-alibi": make_decoder([dataclasses.replace(ONLINE, slopes=slopes_of(4))] * 2, BLOOM),
    "value-map": make_decoder(
        [Shape(kv_heads=1, value_dim=16, value_map=True), Shape(kv_heads=2, value_dim=4, value_map=True)]
    ),
    "mixed-layers": make_decoder(
        [Shape(), dataclasses.replace(ONLINE, value_dim=12, value_map=True), Shape(kv_heads=1)]
    ),
}


@pytest.mark.parametrize("name", DECODERS)
def test_float32_equals_the_reference(name: str, tmp_path: Path) -> None:
    contract = write(DECODERS[name], tmp_path)
    session = with_taps(tmp_path / GRAPH_FILE).session(quiet())
    assert disagreement(DECODERS[name], session, contract) < 5e-6


@pytest.mark.parametrize("name", DECODERS)
def test_float16_equals_the_reference_on_the_same_weights(name: str, tmp_path: Path) -> None:
    contract = write(DECODERS[name], tmp_path, "float16")
    session = with_taps(tmp_path / GRAPH_FILE).session(quiet())
    assert disagreement(rounded(DECODERS[name], torch.float16), session, contract) < 5e-3


@pytest.mark.parametrize("name", DECODERS)
def test_bfloat16_in_float32_arithmetic_equals_the_reference_on_the_same_weights(
    name: str, tmp_path: Path
) -> None:
    contract = write(DECODERS[name], tmp_path, "bfloat16")
    session = as_float32(tmp_path / GRAPH_FILE, taps=True).session(quiet())
    rotates = DECODERS[name].layers[0].attention.rope is not None
    tolerance = 1e-2 if rotates else 5e-6  # the graph's rotary tables are rounded, too
    assert disagreement(rounded(DECODERS[name], torch.bfloat16), session, contract) < tolerance


def test_padded_and_chunked_prompts_equal_each_prompt_alone(tmp_path: Path) -> None:
    decoder = DECODERS["mixed-layers"]
    contract = write(decoder, tmp_path)
    tokens = torch.randint(0, VOCAB, (2, 9))
    caller = Caller(open_session(tmp_path), contract, 2, 12)
    pieces = [
        caller(tokens[:, start:stop], [start] * 2)["logits"] for start, stop in ((0, 2), (2, 8), (8, 9))
    ]
    for row, length in enumerate((9, 5)):
        alone = reference.forward(decoder, tokens[row : row + 1, :length])
        np.testing.assert_allclose(np.concatenate(pieces, axis=1)[row, :length], alone[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama-gqa-tied", "mistral-window", "bloom-6-heads"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_garbage_in_unused_slots_changes_no_bit(name: str, dtype: str, tmp_path: Path) -> None:
    contract = write(DECODERS[name], tmp_path, dtype)
    session = open_session(tmp_path)
    ids = torch.randint(0, VOCAB, (2, 6))
    clean, poisoned = (Caller(session, contract, 2, 16, fill) for fill in (0.0, 1e3))
    for start, stop in ((0, 5), (5, 6)):
        wanted, found = (caller(ids[:, start:stop], [start] * 2)["logits"] for caller in (clean, poisoned))
        np.testing.assert_array_equal(found, wanted)


def test_garbage_in_a_used_slot_changes_logits(tmp_path: Path) -> None:
    contract = write(DECODERS["llama-mha"], tmp_path)
    session = open_session(tmp_path)
    ids = torch.randint(0, VOCAB, (2, 1))
    clean, poisoned = (Caller(session, contract, 2, 16, fill)(ids, [3, 3])["logits"] for fill in (0.0, 1e3))
    assert np.abs(poisoned - clean).max() > 0.1


@pytest.mark.parametrize("change", ["scale", "swapped_heads", "window", "base"])
def test_a_slightly_different_decoder_is_detected(change: str, tmp_path: Path) -> None:
    decoder = DECODERS["llama-mha"]
    layer = decoder.layers[0]
    attention = layer.attention
    if change == "scale":
        attention = dataclasses.replace(attention, scale=attention.scale * 1.01)
    elif change == "swapped_heads":
        attention = dataclasses.replace(attention, k=Linear(attention.k.weight.roll(attention.head_dim, 0)))
    elif change == "window":
        attention = dataclasses.replace(attention, window=8)
    else:
        assert attention.rope is not None
        attention = dataclasses.replace(attention, rope=Rope(attention.rope.inv_freq * 1.01))
    layers = [dataclasses.replace(layer, attention=attention), decoder.layers[1]]
    contract = write(dataclasses.replace(decoder, layers=layers), tmp_path)
    assert disagreement(decoder, open_session(tmp_path), contract) > 1e-4


def test_logits_index_selects_tokens(tmp_path: Path) -> None:
    decoder = DECODERS["llama-mha"]
    contract = write(decoder, tmp_path)
    session = open_session(tmp_path)
    ids = torch.randint(0, VOCAB, (2, 6))
    caller = Caller(session, contract, 2, 8)
    feeds = {
        "input_ids": ids.numpy(),
        "position_ids": np.tile(np.arange(6), (2, 1)),
        "write_indices": np.zeros(2, np.int64),
        "logits_index": np.array([[5], [2]]),
    }
    chosen = session.run(["logits"], {**feeds, **caller.caches})[0]
    everything = reference.forward(decoder, ids)
    assert chosen.shape == (2, 1, VOCAB)
    np.testing.assert_allclose(chosen[:, 0], torch.stack((everything[0, 5], everything[1, 2])), atol=1e-5)
