"""The graph equals the reference for each feature of the neutral decoder, plain and lowered."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import test_graph_evicting as evicting
import torch
from support.blocks import BLOCKS
from support.dropped_features import DROPPED
from support.graph_decoders import disagreement, open_session, quiet, rounded, write

from kvexport.eviction.config import Eviction
from kvexport.graph import GRAPH_FILE, with_taps
from kvexport.graph.keep_float32 import Float32Exceptions
from kvexport.graph.lowering import lower, lowered_contract
from kvexport.graph.lowering.primitives import OPERATORS

LOWERINGS = ("ort-cpu", "decomposed17")


@pytest.mark.parametrize("name", BLOCKS)
def test_float32_equals_the_reference(name: str, tmp_path: Path) -> None:
    contract = write(BLOCKS[name], tmp_path)
    session = with_taps(tmp_path / GRAPH_FILE).session(quiet())
    assert disagreement(BLOCKS[name], session, contract) < 5e-6


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", BLOCKS)
def test_lowered_graph_equals_the_reference(name: str, lowering: str, tmp_path: Path) -> None:
    contract = lowered_contract(write(BLOCKS[name], tmp_path), lowering)
    path = tmp_path / "lowered.onnx"
    ir.save(lower(tmp_path / GRAPH_FILE, lowering), path)
    assert disagreement(BLOCKS[name], with_taps(path).session(quiet()), contract, fill=3.0) < 5e-6
    if lowering == "decomposed17":
        onnx.checker.check_model(str(path), full_check=True)
        assert {node.op_type for node in ir.load(path).graph} <= OPERATORS


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_float16_equals_the_reference_on_the_same_weights(name: str, tmp_path: Path) -> None:
    contract = write(BLOCKS[name], tmp_path, "float16")
    session = with_taps(tmp_path / GRAPH_FILE).session(quiet())
    assert disagreement(rounded(BLOCKS[name], torch.float16), session, contract) < 1e-2


@pytest.mark.parametrize("name", ["all-norms", "parallel-output-norms", "layer-norm-without-weight"])
def test_float16_with_a_float32_stream_equals_the_reference(name: str, tmp_path: Path) -> None:
    exceptions = Float32Exceptions(stream=True, mlps=frozenset({0}))
    contract = write(BLOCKS[name], tmp_path, "float16", exceptions=exceptions)
    copy = with_taps(tmp_path / GRAPH_FILE)
    assert disagreement(rounded(BLOCKS[name], torch.float16), copy.session(quiet()), contract) < 1e-2
    values = {
        value.name: value.dtype for node in ir.load(tmp_path / GRAPH_FILE).graph for value in node.outputs
    }
    assert {values[f"layers.0.{part}"] for part in ("residual", "mlp.down")} == {ir.DataType.FLOAT}


EVICTING = (
    "softcap",
    "clip",
    "qk-norm-after-rotation",
    "two-ropes",
    "parallel-one-norm",
    "learned-positions",
)


@pytest.mark.parametrize("policy", ["l2-norm", "window"])
@pytest.mark.parametrize("name", EVICTING)
def test_evicting_graph_equals_the_reference(name: str, policy: str, tmp_path: Path) -> None:
    eviction = Eviction(policy, 9, protect_first=1, protect_recent=3)
    contract = evicting.write(BLOCKS[name], tmp_path, eviction)
    session = open_session(tmp_path)
    assert evicting.disagreement(BLOCKS[name], session, contract, eviction) < 5e-6


@pytest.mark.parametrize("dropped", DROPPED)
def test_a_graph_without_the_feature_is_detected(dropped: str, tmp_path: Path) -> None:
    """Negative control."""
    name, change = DROPPED[dropped]
    contract = write(change(BLOCKS[name]), tmp_path)
    session = with_taps(tmp_path / GRAPH_FILE).session(quiet())
    assert disagreement(BLOCKS[name], session, contract) > 1e-3


def test_layers_with_equal_ropes_share_their_tables(tmp_path: Path) -> None:
    write(BLOCKS["two-ropes"], tmp_path)
    stored = ir.load(tmp_path / GRAPH_FILE).graph.initializers
    assert [name for name in stored if name.startswith("rope")] == [
        "rope.cos",
        "rope.sin",
        "rope1.cos",
        "rope1.sin",
    ]


def test_a_decoder_without_rope_has_no_tables(tmp_path: Path) -> None:
    write(BLOCKS["no-rope-no-alibi"], tmp_path)
    assert not any(name.startswith("rope") for name in ir.load(tmp_path / GRAPH_FILE).graph.initializers)
