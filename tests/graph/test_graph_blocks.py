"""The graph equals the reference for each feature of the neutral decoder, plain and lowered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import test_graph_evicting as evicting
import torch
from support.blocks import BLOCKS
from support.graph_decoders import disagreement, open_session, quiet, rounded, write

from kvexport.eviction.config import Eviction
from kvexport.graph import GRAPH_FILE, with_taps
from kvexport.graph.keep_float32 import Float32Exceptions
from kvexport.graph.lowering import lower, lowered_contract
from kvexport.graph.lowering.primitives import OPERATORS
from kvexport.model.decoder import Attention, Decoder, Layer, Rope

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


def _layer(**changes: object) -> Callable[[Decoder], Decoder]:
    return lambda decoder: dataclasses.replace(
        decoder,
        layers=[dataclasses.replace(layer, **changes) for layer in decoder.layers],  # type: ignore[arg-type]
    )


def _attention(change: Callable[[Attention], Attention]) -> Callable[[Decoder], Decoder]:
    def changed(layer: Layer) -> Layer:
        return dataclasses.replace(layer, attention=change(layer.attention))

    return lambda decoder: dataclasses.replace(decoder, layers=[changed(each) for each in decoder.layers])


def _fields(**changes: object) -> Callable[[Decoder], Decoder]:
    return _attention(lambda attention: dataclasses.replace(attention, **changes))  # type: ignore[arg-type]


def _rotating(rope: Callable[[Rope], Rope | None]) -> Callable[[Decoder], Decoder]:
    def change(attention: Attention) -> Attention:
        return (
            attention if attention.rope is None else dataclasses.replace(attention, rope=rope(attention.rope))
        )

    return _attention(change)


def _embedding(**changes: object) -> Callable[[Decoder], Decoder]:
    return lambda decoder: dataclasses.replace(
        decoder,
        embedding=dataclasses.replace(decoder.embedding, **changes),  # type: ignore[arg-type]
    )


def _decoder(**changes: object) -> Callable[[Decoder], Decoder]:
    return lambda decoder: dataclasses.replace(decoder, **changes)  # type: ignore[arg-type]


DROPPED: dict[str, tuple[str, Callable[[Decoder], Decoder]]] = {
    "attention output norm": ("all-norms", _layer(attention_output_norm=None)),
    "MLP output norm": ("all-norms", _layer(mlp_output_norm=None)),
    "attention residual norm": ("all-norms", _layer(attention_residual_norm=None)),
    "MLP residual norm": ("all-norms", _layer(mlp_residual_norm=None)),
    "parallel block": ("parallel-two-norms", _layer(parallel=False)),
    "second norm": ("parallel-two-norms", _layer(mlp_norm=None)),
    "residual multiplier": ("residual-multiplier", _layer(residual_multiplier=1.0)),
    "norm over heads": ("qk-norm-after-rotation", _fields(norm_after_rotation=False)),
    "clip": ("clip", _fields(clip=None)),
    "softcap": ("softcap", _fields(softcap=None)),
    "rope": ("rope-in-some-layers", _rotating(lambda rope: None)),
    "second rope": (
        "two-ropes",
        _rotating(lambda rope: Rope(BLOCKS["two-ropes"].layers[0].attention.rope.inv_freq)),
    ),  # type: ignore[union-attr]
    "magnitude": ("rope-magnitude", _rotating(lambda rope: Rope(rope.inv_freq))),
    "embedding multiplier": ("embedding-multiplier", _embedding(multiplier=1.0)),
    "learned positions": ("learned-positions", _embedding(positions=None)),
    "logit multiplier": ("logit-multiplier", _decoder(logit_multiplier=1.0)),
    "logit softcap": ("logit-softcap", _decoder(logit_softcap=None)),
}


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
