"""Cached keys with their own rotary frequencies: every lowering equals the reference."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from support.combinations import representatives
from support.decoders import make_decoder, random_windows, with_attention
from support.graph_decoders import disagreement, quiet, rounded, write

from kvexport.convert import KVShape, LayerPlan, convert, methods_for
from kvexport.graph import GRAPH_FILE
from kvexport.graph.lowering import LOWERINGS, lower, lowered_contract
from kvexport.graph.taps import with_taps
from kvexport.model.decoder import Attention, Decoder


def wide(style: str = "llama", *, key_dim: int = 16, value_dim: int = 16, kv_heads: int = 1) -> Decoder:
    """Two layers whose folded keys have several pairs with the same frequency."""
    decoder = make_decoder(style, layers=2, sharpness=2.0, dtype=torch.float32)
    way = LayerPlan(
        methods_for("fold", decoder.layers[0].attention)[0], KVShape(kv_heads, key_dim, value_dim)
    )
    layers = [each.layer for each in convert(decoder, random_windows(decoder, 16, 24), [way] * 2)]
    assert all(layer.attention.frequencies is not None for layer in layers)
    return dataclasses.replace(decoder, layers=layers)


CASES = {
    "wide": wide(),
    "unequal": wide(key_dim=24, value_dim=16),
    "bias": wide("bias"),
    "gqa": wide("gqa"),
    "two groups": wide(kv_heads=2, key_dim=12, value_dim=12),
}


@pytest.mark.parametrize(("lowering", "name"), representatives(list(LOWERINGS), list(CASES)))
def test_every_lowering_equals_the_reference(lowering: str, name: str, tmp_path: Path) -> None:
    contract, path = write(CASES[name], tmp_path), tmp_path / "lowered.onnx"
    ir.save(lower(tmp_path / GRAPH_FILE, lowering), path)
    assert (
        disagreement(
            CASES[name], with_taps(path).session(quiet()), lowered_contract(contract, lowering), fill=3.0
        )
        < 5e-6
    )


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_every_lowering_equals_the_reference_in_float16(lowering: str, tmp_path: Path) -> None:
    contract, path = write(CASES["wide"], tmp_path, "float16"), tmp_path / "lowered.onnx"
    ir.save(lower(tmp_path / GRAPH_FILE, lowering), path)
    session, decoder = with_taps(path).session(quiet()), rounded(CASES["wide"], torch.float16)
    assert disagreement(decoder, session, lowered_contract(contract, lowering), fill=3.0) < 5e-3


def test_a_wrong_frequency_is_detected(tmp_path: Path) -> None:
    """Negative control."""

    def shifted(attention: Attention) -> Attention:
        assert attention.frequencies is not None
        return dataclasses.replace(attention, frequencies=attention.frequencies.roll(1))

    contract = write(with_attention(CASES["wide"], shifted), tmp_path)
    found = disagreement(CASES["wide"], with_taps(tmp_path / GRAPH_FILE).session(quiet()), contract, fill=3.0)
    assert found > 1e-2


def test_rows_are_gathered_once_for_equal_frequencies(tmp_path: Path) -> None:
    first, second = (layer.attention for layer in CASES["wide"].layers)
    alike = with_attention(
        CASES["wide"], lambda each: dataclasses.replace(each, frequencies=first.frequencies)
    )
    counts = []
    for decoder, name in ((alike, "alike"), (CASES["wide"], "own")):
        write(decoder, tmp_path / name)
        graph = ir.load(tmp_path / name / GRAPH_FILE).graph
        counts.append(
            sum(node.op_type == "Gather" and node.outputs[0].name.startswith("rope.choice") for node in graph)
        )
    own = 1 if torch.equal(first.frequencies, second.frequencies) else 2
    assert counts == [2, 2 * own]
