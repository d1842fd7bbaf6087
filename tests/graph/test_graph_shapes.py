"""Layers of different shapes and methods in one model: every lowering equals the reference."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from support.combinations import representatives
from support.decoders import make_decoder, random_windows
from support.graph_decoders import disagreement, quiet, rounded, write
from support.tiny_bundles import write_bundle

from kvexport.convert import KVShape, LayerPlan, convert, trained_shape
from kvexport.convert.methods import METHODS
from kvexport.engine import EngineOptions, build_engine
from kvexport.engine.engine_graph import fix_sizes
from kvexport.errors import UsageError
from kvexport.graph import GRAPH_FILE, past
from kvexport.graph.lint import Finding, Parser, lint, refusals
from kvexport.graph.lowering import LOWERINGS, lower, lowered_contract
from kvexport.graph.taps import with_taps
from kvexport.model.decoder import Decoder

UNCHANGED = None  # a layer with its trained heads
Cut = tuple[str, KVShape] | None

CASES: dict[str, tuple[str, list[Cut]]] = {
    "wide": ("llama", [("online", KVShape(1, 16, 16)), ("online", KVShape(2, 12, 12))]),
    "wider than all heads together but one": (
        "bias",
        [("online", KVShape(1, 24, 24)), ("online", KVShape(1, 31, 31))],
    ),
    "keys wider than values": ("llama", [("online", KVShape(1, 24, 8)), ("fold", KVShape(1, 24, 8))]),
    "values wider than keys": ("bias", [("online", KVShape(1, 8, 24)), ("fold", KVShape(2, 6, 16))]),
    "narrower than trained": ("llama", [("online", KVShape(4, 5, 3)), ("fold", KVShape(4, 4, 8))]),
    "every method": (
        "llama",
        [
            ("fold", KVShape(2, 8, 8)),
            UNCHANGED,
            ("online", KVShape(1, 16, 16)),
            ("mean-pool", KVShape(1, 8, 8)),
            ("svd-a", KVShape(2, 12, 12)),
        ],
    ),
    "shared heads": ("gqa", [("online", KVShape(1, 24, 16)), UNCHANGED, ("fold", KVShape(2, 12, 12))]),
    "normalised keys": ("qwen3", [("online", KVShape(1, 16, 24)), UNCHANGED, ("online", KVShape(2, 8, 8))]),
    "no rotation": ("bloom", [("online", KVShape(1, 16, 16)), ("online", KVShape(2, 12, 8)), UNCHANGED]),
    "window": ("window", [("online", KVShape(1, 16, 16)), ("fold", KVShape(1, 16, 24))]),
}


def cases(*names: str) -> pytest.MarkDecorator:
    """These cases, each in every lowering; some are representatives."""
    return pytest.mark.parametrize(("lowering", "name"), representatives(list(LOWERINGS), names))


@cache
def cut(name: str) -> Decoder:
    style, cuts = CASES[name]
    sizes = {"heads": 8, "kv_heads": 4} if style == "gqa" else {}
    return converted(make_decoder(style, layers=len(cuts), sharpness=2.0, dtype=torch.float32, **sizes), cuts)


def converted(decoder: Decoder, cuts: list[Cut]) -> Decoder:
    trained = trained_shape(decoder.layers[0].attention)
    layer_plans = [
        LayerPlan(METHODS["online"], trained) if each is None else LayerPlan(METHODS[each[0]], each[1])
        for each in cuts
    ]
    return dataclasses.replace(
        decoder, layers=[each.layer for each in convert(decoder, random_windows(decoder, 8, 24), layer_plans)]
    )


def shapes(decoder: Decoder) -> list[KVShape]:
    return [trained_shape(layer.attention) for layer in decoder.layers]


def wanted_shapes(name: str) -> list[KVShape]:
    return [KVShape(4, 8, 8) if each is None else each[1] for each in CASES[name][1]]


@pytest.mark.parametrize("name", CASES)
def test_conversion_gives_every_layer_its_own_shape(name: str) -> None:
    assert shapes(cut(name)) == wanted_shapes(name)


@cases(*CASES)
def test_every_lowering_equals_the_reference(lowering: str, name: str, tmp_path: Path) -> None:
    contract, path = write(cut(name), tmp_path), tmp_path / "lowered.onnx"
    ir.save(lower(tmp_path / GRAPH_FILE, lowering), path)
    assert (
        disagreement(
            cut(name), with_taps(path).session(quiet()), lowered_contract(contract, lowering), fill=3.0
        )
        < 5e-6
    )


@cases("wide", "values wider than keys", "every method", "shared heads", "no rotation")
def test_every_lowering_equals_the_reference_in_float16(lowering: str, name: str, tmp_path: Path) -> None:
    contract, path = write(cut(name), tmp_path, "float16"), tmp_path / "lowered.onnx"
    ir.save(lower(tmp_path / GRAPH_FILE, lowering), path)
    session, decoder = with_taps(path).session(quiet()), rounded(cut(name), torch.float16)
    assert disagreement(decoder, session, lowered_contract(contract, lowering), fill=3.0) < 5e-3


@pytest.mark.parametrize(
    ("part", "lowering"), representatives(("key_map", "query_map", "value_map", "scale"), list(LOWERINGS))
)
def test_a_map_of_another_layer_is_detected(part: str, lowering: str, tmp_path: Path) -> None:
    """Negative control: a tensor of another layer of the same shape, or the scale of the wider head."""
    decoder = converted(
        make_decoder("llama", layers=2, sharpness=2.0, dtype=torch.float32),
        [("online", KVShape(1, 16, 16))] * 2,
    )
    first, second = decoder.layers
    value = 16**-0.5 if part == "scale" else getattr(second.attention, part)
    assert value is not None
    wrong = dataclasses.replace(first, attention=dataclasses.replace(first.attention, **{part: value}))
    contract, path = (
        write(dataclasses.replace(decoder, layers=[wrong, second]), tmp_path),
        tmp_path / "lowered.onnx",
    )
    ir.save(lower(tmp_path / GRAPH_FILE, lowering), path)
    assert (
        disagreement(
            decoder, with_taps(path).session(quiet()), lowered_contract(contract, lowering), fill=3.0
        )
        > 1e-2
    )


@pytest.mark.parametrize("name", CASES)
def test_contract_and_graph_have_the_converted_cache_shapes(name: str, tmp_path: Path) -> None:
    contract = write(cut(name), tmp_path)
    model = onnx.load(tmp_path / GRAPH_FILE, load_external_data=False)
    written = {
        value.name: tuple(d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim)
        for value in model.graph.input
    }
    declared = {spec.name: spec.shape for spec in contract.inputs}
    for layer, shape in enumerate(wanted_shapes(name)):
        window = cut(name).layers[layer].attention.window
        slots = "capacity" if window is None else f"window_{window}"
        for which, width in (("key", shape.key_dim), ("value", shape.value_dim)):
            assert (
                declared[past(layer, which)]
                == written[past(layer, which)]
                == ("batch", shape.kv_heads, slots, width)
            )


# Attention that TensorRT supports

RTX = Parser("tensorrt-rtx", (1, 7, 1))


def findings_of(decoder: Decoder, directory: Path, lowering: str, dtype: str = "float16") -> list[Finding]:
    write(decoder, directory, dtype)
    model = lower(directory / GRAPH_FILE, lowering)
    fix_sizes(model, {"batch": 1, "capacity": 64})
    return lint(model, RTX)


@pytest.mark.parametrize("name", ["keys wider than values", "values wider than keys"])
def test_unequal_widths_are_reported_with_a_remedy_that_works(name: str, tmp_path: Path) -> None:
    refused = refusals(findings_of(cut(name), tmp_path, "std24"))
    assert len(refused) == 2
    for index, (finding, shape) in enumerate(zip(refused, wanted_shapes(name), strict=True)):
        assert finding.operator == "Attention" and finding.node.startswith(f"layers.{index}.")
        assert f"keys are {shape.key_dim} wide and values {shape.value_dim}" in finding.problem
        assert "--lowering decomposed17" in finding.remedy
    assert refusals(findings_of(cut(name), tmp_path / "remedy", "decomposed17")) == []


def test_only_the_layer_of_unequal_widths_is_reported(tmp_path: Path) -> None:
    refused = refusals(findings_of(cut("normalised keys"), tmp_path, "std24"))
    assert [finding.node.split(".")[1] for finding in refused] == ["0"]


@pytest.mark.parametrize("name", ["wide", "every method"])
def test_equal_widths_are_accepted_and_multiples_of_8_from_16_on_are_fused(name: str, tmp_path: Path) -> None:
    decoder = cut(name)
    notes = findings_of(decoder, tmp_path, "std24")
    unpadded = [
        i for i, shape in enumerate(shapes(decoder)) if shape.key_dim == 12
    ]  # a bool mask with padding
    assert [int(finding.node.split(".")[1]) for finding in refusals(notes)] == unpadded
    unfused = [i for i, shape in enumerate(shapes(decoder)) if shape.key_dim < 12]
    assert [int(finding.node.split(".")[1]) for finding in notes if finding.note] == unfused
    assert len(unpadded) + len(unfused) < len(shapes(decoder))


def wide_decoder(*cuts: Cut) -> Decoder:
    """Eight KV heads of 32, so that one cached head can be 256 wide."""
    decoder = make_decoder(
        "llama", layers=len(cuts), heads=8, head_dim=32, dtype=torch.float32, max_positions=64
    )
    return converted(decoder, list(cuts))


@pytest.fixture(scope="module")
def rtx() -> Any:
    pytest.importorskip("tensorrt_rtx")
    from kvexport.engine.library import load_library

    return load_library("tensorrt-rtx")


@pytest.mark.slow
@pytest.mark.tensorrt
def test_tensorrt_rtx_fuses_heads_of_128_and_256(rtx: Any, tmp_path: Path) -> None:
    decoder = wide_decoder(
        ("online", KVShape(2, 128, 128)), ("online", KVShape(1, 256, 256)), ("fold", KVShape(2, 128, 128))
    )
    bundle = write_bundle(tmp_path / "bundle", decoder, dtype="float16")
    record = build_engine(bundle, EngineOptions(chunk=16), compute_capabilities=("8.9",))
    assert (record.lowering, record.decomposed) == ("std24", ())
    assert [record.layers[name] for name in ("KV_CACHE_UPDATE", "ATTENTION_INPUT", "ATTENTION_OUTPUT")] == [
        6,
        3,
        3,
    ]


@pytest.mark.slow
@pytest.mark.tensorrt
def test_tensorrt_rtx_builds_unequal_widths_only_in_decomposed17(rtx: Any, tmp_path: Path) -> None:
    decoder = wide_decoder(("online", KVShape(1, 256, 128)), ("fold", KVShape(2, 64, 96)))
    bundle = write_bundle(tmp_path / "bundle", decoder, dtype="float16")
    with pytest.raises(UsageError, match="keys are 256 wide and values 128"):
        build_engine(bundle, EngineOptions(chunk=16, lowering="std24"), compute_capabilities=("8.9",))
    assert (
        build_engine(bundle, EngineOptions(chunk=16), compute_capabilities=("8.9",)).lowering
        == "decomposed17"
    )
