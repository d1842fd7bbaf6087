"""Graphs with integer weights: their form, and that every lowering equals the quantised reference."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from support.decoders import make_decoder
from support.graph_decoders import disagreement, quiet, rounded, write
from support.quantized_decoders import quantize_decoder, round_to_format

from kvexport.bundle.formats import WeightFormat, weight_format
from kvexport.errors import UsageError
from kvexport.graph import DATA_FILE, GRAPH_FILE, DecoderWriter, Float32Exceptions, as_float32, with_taps
from kvexport.graph.lowering import LOWERINGS, lower, lowered_contract
from kvexport.graph.taps import GraphCopy
from kvexport.model.decoder import Decoder, Linear, WeightCodes

STYLES = ("gqa", "bloom", "qwen3")
LINEAR_MAPS = 7  # of a gated layer


def decoder_of(name: str, style: str = "gqa", *, tied: bool = False, dtype: str = "float32") -> Decoder:
    """A random decoder 64 wide whose weights are `name`, in blocks of 32."""
    decoder = make_decoder(style, hidden=64, head_dim=16, dtype=torch.float32)
    if tied:
        decoder = dataclasses.replace(decoder, head=None)
    return quantize_decoder(decoder, name, dtype=dtype)


def exact() -> onnxruntime.SessionOptions:
    """Options with which ONNX Runtime does not round activations to int8."""
    options = quiet()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return options


def lowered(directory: Path, lowering: str) -> GraphCopy:
    """A copy with taps of a lowered graph, whose MatMulNBits do not round activations to int8."""
    model = lower(directory / GRAPH_FILE, lowering)
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    ir.save(model, directory / "lowered.onnx")
    return with_taps(directory / "lowered.onnx")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_every_lowering_equals_the_reference(lowering: str, name: str, tied: bool, tmp_path: Path) -> None:
    decoder = decoder_of(name, tied=tied)
    contract = lowered_contract(write(decoder, tmp_path), lowering, quantized=True)
    copy = lowered(tmp_path, lowering)
    assert disagreement(decoder, copy.session(exact()), contract, fill=3.0) < 5e-6


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ["int4", "int8"])
def test_every_style_equals_the_reference(style: str, name: str, tmp_path: Path) -> None:
    decoder = decoder_of(name, style)
    contract = write(decoder, tmp_path)
    assert disagreement(decoder, with_taps(tmp_path / GRAPH_FILE).session(exact()), contract) < 5e-6


def test_a_changed_code_is_a_difference(tmp_path: Path) -> None:
    decoder = decoder_of("int4")
    contract = write(decoder, tmp_path)
    layer = decoder.layers[0]
    weight = layer.attention.o.weight.clone()
    weight[0, 0] += 2 * float(layer.attention.o.codes.scales[0, 0])  # type: ignore[union-attr]
    attention = dataclasses.replace(layer.attention, o=Linear(weight))
    other = dataclasses.replace(
        decoder, layers=[dataclasses.replace(layer, attention=attention), *decoder.layers[1:]]
    )
    session = with_taps(tmp_path / GRAPH_FILE).session(exact())
    assert disagreement(other, session, contract) > 1e-4


def test_int8_activations_are_what_differs_without_the_exact_level(tmp_path: Path) -> None:
    decoder = decoder_of("int4")
    contract = write(decoder, tmp_path)
    difference = disagreement(decoder, with_taps(tmp_path / GRAPH_FILE).session(quiet()), contract)
    assert 1e-4 < difference < 0.2


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_float16_equals_the_reference(lowering: str, name: str, tied: bool, tmp_path: Path) -> None:
    decoder = decoder_of(name, tied=tied, dtype="float16")
    contract = lowered_contract(write(decoder, tmp_path, "float16"), lowering, quantized=True)
    session = lowered(tmp_path, lowering).session(exact())
    assert disagreement(rounded(decoder, torch.float16), session, contract, fill=3.0) < 5e-3


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_bfloat16_computes_in_float32_on_the_same_codes(name: str, tmp_path: Path) -> None:
    decoder = decoder_of(name, "bloom", dtype="bfloat16")  # without rotary tables, which are rounded, too
    contract = write(decoder, tmp_path, "bfloat16")
    session = as_float32(tmp_path / GRAPH_FILE, taps=True).session(exact())

    plain = rounded(decoder, torch.bfloat16)
    exact_layers = [
        dataclasses.replace(layer, attention=_with_codes(layer.attention), mlp=_with_codes(layer.mlp))
        for layer in plain.layers
    ]
    table = plain.embedding
    assert table.codes is not None
    expected = dataclasses.replace(
        plain,
        layers=exact_layers,
        embedding=dataclasses.replace(table, weight=_dequantized(table.codes)),
    )
    assert disagreement(expected, session, contract) < 5e-6


def _dequantized(codes: WeightCodes) -> torch.Tensor:
    return codes.codes * codes.scales.repeat_interleave(codes.codes.shape[1] // codes.scales.shape[1], 1)


def _exact(part: object) -> object:
    """A linear map whose weight is its codes times its scales in float32."""
    if not isinstance(part, Linear) or part.codes is None:
        return part
    return dataclasses.replace(part, weight=_dequantized(part.codes))


def _with_codes(part: object) -> object:
    fields = dataclasses.fields(part)  # type: ignore[arg-type]
    return dataclasses.replace(part, **{f.name: _exact(getattr(part, f.name)) for f in fields})  # type: ignore[type-var]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["int4", "int8"])
def test_form_of_the_weights(name: str, dtype: str, tmp_path: Path) -> None:
    """Integers [in, out] with positive scales of the graph's dtype, no zero points, dequantised directly."""
    decoder = decoder_of(name, dtype=dtype)
    write(decoder, tmp_path, dtype)
    model = ir.load(tmp_path / GRAPH_FILE)
    dequantized = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    assert len(dequantized) == 2 * LINEAR_MAPS + 2
    for node in dequantized:
        stored, scale = node.inputs
        assert stored is not None and scale is not None and stored.const_value is not None
        assert stored.is_initializer() and isinstance(stored.const_value, ir.ExternalTensor)
        assert stored.dtype == (ir.DataType.INT4 if name == "int4" else ir.DataType.INT8)
        scales = scale.const_value.numpy()  # type: ignore[union-attr]
        assert scales.dtype.name == dtype == node.outputs[0].dtype.numpy().name  # type: ignore[union-attr]
        assert (scales > 0).all()
        is_table = stored.name == "embedding.weight"
        rows, columns = stored.const_value.shape
        if name == "int8":
            assert scales.shape == (rows if is_table else columns,)
            assert node.attributes["axis"].as_int() == (0 if is_table else 1)
        else:
            axis = 1 if is_table else 0
            assert (node.attributes["axis"].as_int(), node.attributes["block_size"].as_int()) == (axis, 32)
            assert scales.shape == ((rows, columns // 32) if is_table else (rows // 32, columns))
        assert all(use.node.op_type in ("MatMul", "Gather") for use in node.outputs[0].uses())


def test_stored_codes_are_those_of_the_decoder(tmp_path: Path) -> None:
    decoder = decoder_of("int4")
    write(decoder, tmp_path)
    stored = ir.load(tmp_path / GRAPH_FILE).graph.initializers
    codes = decoder.layers[1].mlp.down.codes
    assert codes is not None and decoder.embedding.codes is not None
    for name, expected in (
        ("layers.1.mlp.down.weight", codes.codes.T),
        ("embedding.weight", decoder.embedding.codes.codes),
    ):
        tensor = stored[name].const_value
        assert tensor is not None and tensor.nbytes == expected.numel() // 2
        np.testing.assert_array_equal(tensor.numpy().astype(np.int8), expected.numpy())


def optimized(directory: Path, lowering: str) -> ir.Graph:
    """The graph that ONNX Runtime makes of a lowering."""
    model = lower(directory / GRAPH_FILE, lowering)
    ir.save(model, directory / "lowered.onnx")
    options = quiet()
    options.optimized_model_filepath = str(directory / "optimized.onnx")
    onnxruntime.InferenceSession(directory / "lowered.onnx", options, providers=["CPUExecutionProvider"])
    return ir.load(directory / "optimized.onnx").graph


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["int4", "int8"])
def test_onnx_runtime_fuses_every_linear_map_and_expands_no_table(
    name: str, tied: bool, tmp_path: Path
) -> None:
    write(decoder_of(name, tied=tied), tmp_path)
    graph = optimized(tmp_path, "ort-cpu")
    products = [node for node in graph if node.op_type == "MatMulNBits"]
    assert len(products) == 2 * LINEAR_MAPS + 1
    assert {node.attributes["accuracy_level"].as_int() for node in products} == {4}
    assert {node.attributes["bits"].as_int() for node in products} == {4 if name == "int4" else 8}
    counts = Counter(node.op_type for node in graph)
    assert counts["DequantizeLinear"] == 0
    assert counts["GatherBlockQuantized"] == (1 if name == "int4" else 0)
    constants = set(graph.initializers)
    assert not any(
        node.op_type in ("MatMul", "Gemm", "FusedMatMul") and node.inputs[1].name in constants  # type: ignore[union-attr]
        for node in graph
    )


def test_lowerings_store_nothing_more(tmp_path: Path) -> None:
    write(decoder_of("int4", tied=True), tmp_path)
    size = (tmp_path / DATA_FILE).stat().st_size
    lowered(tmp_path, "ort-cpu")
    assert (tmp_path / DATA_FILE).stat().st_size == size
    assert (tmp_path / "lowered.onnx").stat().st_size < 100_000  # no weights in the graph


def test_decomposed17_declares_the_opset_of_int4(tmp_path: Path) -> None:
    write(decoder_of("int4", tied=True), tmp_path)
    model = lower(tmp_path / GRAPH_FILE, "decomposed17")
    assert model.opset_imports == {"": 21} and model.ir_version == 10


@pytest.mark.parametrize("lowering", ["std24", "decomposed17"])
def test_exceptions_in_float32_keep_the_integers(lowering: str, tmp_path: Path) -> None:
    """Scales of an MLP that a float16 graph computes in float32 are constants in float32."""
    decoder = decoder_of("int4", dtype="float16")
    exceptions = Float32Exceptions(stream=True, mlps=frozenset({1}))
    contract = write(decoder, tmp_path, "float16", exceptions=exceptions)
    contract = lowered_contract(contract, lowering, quantized=True)
    copy = lowered(tmp_path, lowering)
    assert disagreement(rounded(decoder, torch.float16), copy.session(exact()), contract) < 5e-3
    graph = ir.load(tmp_path / "lowered.onnx").graph
    (down,) = (node for node in graph if node.name == "layers.1.mlp.down.weight.dequantized")
    assert down.inputs[1].dtype == down.outputs[0].dtype == ir.DataType.FLOAT  # type: ignore[union-attr]
    assert down.inputs[1].const_value is not None  # type: ignore[union-attr]


def test_rejects_a_scale_that_is_0_in_the_dtype(tmp_path: Path) -> None:
    decoder = make_decoder("gqa", hidden=64, dtype=torch.float32)
    codes = round_to_format(decoder.embedding.weight, WeightFormat("int4", 32))
    tiny = dataclasses.replace(codes, scales=codes.scales * 1e-9)
    embedding = dataclasses.replace(decoder.embedding, codes=tiny)
    with pytest.raises(UsageError, match=r"scales of tensor embedding\.weight must be greater than 0"):
        DecoderWriter(tmp_path, dtype="float16", capacity=8, dims=decoder.dims, embedding=embedding)


@pytest.mark.parametrize(
    ("name", "shape", "block", "expected"),
    [
        ("int4", (64, 4096), 128, WeightFormat("int4", 128)),
        ("int4", (64, 4096), 32, WeightFormat("int4", 32)),
        ("int4", (64, 576), 128, WeightFormat("int4", 64)),
        ("int4", (64, 100), 128, WeightFormat("int8")),  # no block divides it
        ("int4", (50257, 768), 128, WeightFormat("int8")),  # an odd last dimension [in, out]
        ("int8", (3, 5), 128, WeightFormat("int8")),
        ("float16", (3, 5), 128, WeightFormat("float16")),
    ],
)
def test_format_of_a_weight(name: str, shape: tuple[int, int], block: int, expected: WeightFormat) -> None:
    assert weight_format(name, *shape, block) == expected
