"""Calibration finds what float16 cannot represent; computed in float32, it equals the reference."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from support.combinations import representatives
from support.graph_decoders import (
    LLAMA,
    QWEN2,
    VOCAB,
    Shape,
    Style,
    disagreement,
    make_decoder,
    quiet,
    rounded,
    write,
)
from test_lowerings import LOWERED

from kvexport.build.float16_overflow import LARGEST, float32_exceptions
from kvexport.calibrate import PeakMeter
from kvexport.errors import UsageError
from kvexport.graph import GRAPH_FILE, Float32Exceptions, lower, lowered_contract
from kvexport.graph.keep_float32 import KeepFloat32
from kvexport.graph.split_layers import split_layers
from kvexport.graph.taps import with_taps
from kvexport.model.decoder import Decoder

RELU = Style("layer", True, True, False, "relu", True, True, True)
POST_NORMS = dataclasses.replace(LLAMA, norms=("attention_residual_norm", "mlp_residual_norm"))
PARALLEL = dataclasses.replace(LLAMA, parallel=True, residual_multiplier=0.5)
STYLES = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "layer-norms": RELU,
    "post-norms": POST_NORMS,
    "parallel": PARALLEL,
}


def with_large_mlp(decoder: Decoder, up: float, down: float) -> Decoder:
    """Scale the second layer's MLP by `up` inside, and by `down` at its output."""
    mlp = decoder.layers[1].mlp
    larger = dataclasses.replace(
        mlp,
        up=dataclasses.replace(mlp.up, weight=mlp.up.weight * up),
        down=dataclasses.replace(mlp.down, weight=mlp.down.weight * down),
    )
    layers = [
        decoder.layers[0],
        dataclasses.replace(decoder.layers[1], mlp=larger),
        *list(decoder.layers)[2:],
    ]
    return dataclasses.replace(decoder, layers=layers)


def exceptions_of(decoder: Decoder) -> Float32Exceptions:
    meter = PeakMeter(decoder, torch.randint(0, VOCAB, (4, 24), generator=torch.Generator().manual_seed(1)))
    for layer in decoder.layers:
        meter.add_layer(layer)
    return float32_exceptions(meter)


CASES = {
    "product": (6e4, 1e-4, Float32Exceptions(mlps=frozenset({1}))),
    "stream": (1e3, 1e3, Float32Exceptions(stream=True, mlps=frozenset({1}))),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("style", STYLES)
def test_calibration_detects_overflow(style: str, case: str) -> None:
    up, down, wanted = CASES[case]
    plain = make_decoder([Shape(kv_heads=2)] * 3, STYLES[style])
    assert exceptions_of(plain) == Float32Exceptions()
    assert exceptions_of(with_large_mlp(plain, up, down)) == wanted


@pytest.mark.parametrize(
    ("lowering", "case", "style"), representatives(("std24", *LOWERED), list(CASES), list(STYLES))
)
def test_float32_exceptions_equal_the_reference(style: str, case: str, lowering: str, tmp_path: Path) -> None:
    up, down, exceptions = CASES[case]
    decoder = rounded(
        with_large_mlp(make_decoder([Shape(kv_heads=2)] * 3, STYLES[style]), up, down), torch.float16
    )
    contract = lowered_contract(write(decoder, tmp_path, "float16", exceptions=exceptions), lowering)
    ir.save(lower(tmp_path / GRAPH_FILE, lowering), tmp_path / "lowered.onnx")
    assert disagreement(decoder, with_taps(tmp_path / "lowered.onnx").session(quiet()), contract) < 1e-2


@pytest.mark.parametrize("multiplier", [1.0, 0.5])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_large_results_of_output_norms_equal_the_reference(
    norm: str, multiplier: float, tmp_path: Path
) -> None:
    """Weights of output norms that float16 represents, with results that it does not."""
    names = ("attention_norm", "mlp_norm", "attention_output_norm", "mlp_output_norm")
    style = Style(norm, norms=names, residual_multiplier=multiplier)
    decoder = make_decoder([Shape(kv_heads=2)] * 2, style)
    for layer in decoder.layers:
        for output_norm in (layer.attention_output_norm, layer.mlp_output_norm):
            assert output_norm is not None and output_norm.weight is not None
            output_norm.weight.mul_(3e4)
    decoder = rounded(decoder, torch.float16)
    exceptions = exceptions_of(decoder)
    assert exceptions == Float32Exceptions(stream=True)
    contract = lowered_contract(write(decoder, tmp_path, "float16", exceptions=exceptions), "decomposed17")
    ir.save(lower(tmp_path / GRAPH_FILE, "decomposed17"), tmp_path / "lowered.onnx")
    session = RoundsEveryNode(tmp_path / "lowered.onnx")
    assert disagreement(decoder, session, contract) < 1e-2  # type: ignore[arg-type]


class RoundsEveryNode:
    """A graph on onnx's reference evaluator, which rounds after every node, as GPUs do."""

    def __init__(self, path: Path) -> None:
        self._model = onnx.load(path)
        self._evaluator = ReferenceEvaluator(self._model)

    def get_outputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=value.name) for value in self._model.graph.output]

    def get_inputs(self) -> list[SimpleNamespace]:
        types = {onnx.TensorProto.FLOAT16: "tensor(float16)"}
        return [
            SimpleNamespace(name=v.name, type=types.get(v.type.tensor_type.elem_type))
            for v in self._model.graph.input
        ]

    def run(self, names: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        with np.errstate(over="ignore", invalid="ignore"):
            return list(self._evaluator.run(names, feeds))  # type: ignore[arg-type]


@pytest.mark.parametrize(("case", "style"), representatives(list(CASES), list(STYLES)))
def test_float16_overflows_without_float32_exceptions(style: str, case: str, tmp_path: Path) -> None:
    up, down, exceptions = CASES[case]
    decoder = rounded(
        with_large_mlp(make_decoder([Shape(kv_heads=2)] * 3, STYLES[style]), up, down), torch.float16
    )
    for chosen, sound in ((exceptions, True), (Float32Exceptions(), False)):
        contract = lowered_contract(write(decoder, tmp_path, "float16", exceptions=chosen), "decomposed17")
        ir.save(lower(tmp_path / GRAPH_FILE, "decomposed17"), tmp_path / "lowered.onnx")
        session = RoundsEveryNode(tmp_path / "lowered.onnx")
        found = disagreement(decoder, session, contract)  # type: ignore[arg-type]
        assert (found < 2e-2) is sound, found


def test_only_the_exceptions_are_float32(tmp_path: Path) -> None:
    write(make_decoder([Shape()] * 2), tmp_path, "float16", exceptions=Float32Exceptions(mlps=frozenset({1})))
    values = {
        value.name: value.dtype for node in ir.load(tmp_path / GRAPH_FILE).graph for value in node.outputs
    }
    assert (
        values["layers.1.mlp.down"]
        == values["layers.1.mlp.gated"]
        == values["layers.1.mlp.up"]
        == ir.DataType.FLOAT
    )
    assert (
        values["layers.1.residual"]
        == values["layers.0.mlp.down"]
        == values["layers.1.mlp_norm"]
        == ir.DataType.FLOAT16
    )
    initializers = ir.load(tmp_path / GRAPH_FILE).graph.initializers.values()
    assert {value.dtype for value in initializers if value.name and "weight" in value.name} == {
        ir.DataType.FLOAT16
    }


def test_parts_of_a_graph_with_a_float32_stream_run(tmp_path: Path) -> None:
    write(make_decoder([Shape()] * 2), tmp_path, "float16", exceptions=Float32Exceptions(stream=True))
    for part in split_layers(tmp_path / GRAPH_FILE, 2, in_float32=False):
        part.session(quiet())


def test_rejects_a_cache_that_float16_cannot_represent() -> None:
    decoder = make_decoder([Shape()])
    attention = decoder.layers[0].attention
    large = dataclasses.replace(
        attention, v=dataclasses.replace(attention.v, weight=attention.v.weight * LARGEST)
    )
    decoder = dataclasses.replace(decoder, layers=[dataclasses.replace(decoder.layers[0], attention=large)])
    with pytest.raises(UsageError, match="keys and values of layer 0"):
        exceptions_of(decoder)


def test_a_large_stream_without_norms_before_attention_is_rejected() -> None:
    """As in OLMo 2: attention and MLP read the stream, which an output norm has made large."""
    style = dataclasses.replace(LLAMA, norms=("attention_output_norm", "mlp_output_norm"))
    decoder = make_decoder([Shape()] * 2, style)
    norm = decoder.layers[0].attention_output_norm
    assert norm is not None and norm.weight is not None
    norm.weight.mul_(5e4)
    mlp, attention = decoder.layers[0].mlp, decoder.layers[1].attention
    assert mlp.gate is not None
    for linear in (mlp.gate, mlp.up, attention.k, attention.v):  # what they compute stays small
        linear.weight.mul_(1e-4)
    with pytest.raises(UsageError, match="keys and values of layer 1, and what they are computed from"):
        exceptions_of(decoder)
    decoder = dataclasses.replace(decoder, layers=decoder.layers[:1])
    assert exceptions_of(decoder) == Float32Exceptions(stream=True, mlps=frozenset({0}))


def test_rejects_an_exception_for_a_missing_layer(tmp_path: Path) -> None:
    write(make_decoder([Shape()]), tmp_path, "float16")
    model = ir.load(tmp_path / GRAPH_FILE)
    with pytest.raises(ir.passes.PreconditionError, match=r"layers\.5\.mlp\.down"):
        KeepFloat32(Float32Exceptions(mlps=frozenset({5})), "float16")(model)
