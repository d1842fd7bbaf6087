"""Builds from checkpoints with quantised weights: what is kept, what is quantised anew, and what is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from support.command_line import run_kvexport
from support.quantized_checkpoints import (
    AWQ_CONFIG,
    SIZES,
    Integers,
    Pack,
    Pair,
    awq,
    compressed,
    compressed_config,
    gptq,
    gptq_config,
    write_pair,
)

from kvexport.bundle import Bundle
from kvexport.bundle.formats import WeightFormat
from kvexport.graph import GRAPH_FILE
from kvexport.model.decoder import Layer
from kvexport.model.loader import load_decoder
from kvexport.quantize.inputs import all_linears

CALIBRATION = ("--calibration", "random", "--samples", "8", "--length", "32", "--no-cache")
TABLES_IN_FLOATS = ("--embedding-weights", "float32", "--head-weights", "float32")
ALL_HEADS = ("--kv-ratio", "1")
MAPS = {"q", "k", "v", "o", "gate", "up", "down"}
Make = Callable[..., Path]


@pytest.fixture
def pair(tiny_checkpoint: Make, tmp_path: Path) -> Callable[[Pack, dict[str, Any]], Pair]:
    def make(pack: Pack, config: dict[str, Any]) -> Pair:
        return write_pair(tiny_checkpoint("llama", **SIZES), tmp_path, pack, config)

    return make


def built(checkpoint: Path, *options: str, name: str = "bundle") -> tuple[Path, dict[str, Any], str]:
    """The bundle, its report, and what is printed beside it."""
    output = checkpoint.parent / name
    code, out, err = run_kvexport("build", checkpoint, "-o", output, *CALIBRATION, "--json", *options)
    assert code == 0, err
    return output, json.loads(out), err


def weights_of(bundle: Path) -> dict[str, NDArray[np.float32]]:
    """The dequantised weights [out, in] of the maps with integers in the graph of a bundle, in float32."""
    model = onnx.load(bundle / GRAPH_FILE)
    tensors = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    found = {}
    for name, codes in tensors.items():
        scales = tensors.get(f"{name}.scale")
        if scales is None or not name.startswith("layers."):
            continue
        numbers, scales = codes.astype(np.float32), scales.astype(np.float32)
        wide = scales[None] if scales.ndim == 1 else scales.repeat(len(numbers) // len(scales), 0)
        found[name.removesuffix(".weight").rpartition(".")[2] + name.split(".")[1]] = (numbers * wide).T
    return found


def stored(layer: Layer) -> dict[str, NDArray[np.float32]]:
    return {name: each.weight.numpy() for name, each in all_linears(layer).items()}


def equal_maps(bundle: Path, floats: Path) -> set[str]:
    """Maps of layer 1 whose weights are, bit for bit, those of the checkpoint."""
    written, wanted = weights_of(bundle), stored(load_decoder(floats).layers[1])
    return {name for name, each in wanted.items() if np.array_equal(written[f"{name}1"], each)}


@pytest.mark.parametrize("method", ["gptq", "awq", "nearest"])
def test_weights_that_are_not_compressed_keep_codes_and_scales(
    method: str, pair: Callable[..., Pair]
) -> None:
    both = pair(gptq(), gptq_config())
    options = ("--weights", "int4", *TABLES_IN_FLOATS, *ALL_HEADS, "--weight-method", method)
    bundle, report, err = built(both.quantized, *options)
    assert equal_maps(bundle, both.floats) == MAPS
    assert report["quantization"]["mean_kl"] == 0  # nothing was quantised anew
    assert report["source_weights"]["format"] == "GPTQ, 4 bits, groups of 32"
    assert report["source_weights"]["layers"] == [dict.fromkeys(MAPS, "kept")] * 2
    assert "14 of 14 linear maps keep their codes and scales" in err
    formats = {share.format for layer in Bundle.open(bundle).weights.layers for share in layer}
    assert formats == {WeightFormat("int4", 32)}
    anew, report, _ = built(both.floats, *options, name="anew")  # negative control
    assert not equal_maps(anew, both.floats) and report["quantization"]["mean_kl"] > 0
    assert report["source_weights"] is None


@pytest.mark.parametrize(
    ("method", "kept"), [("online", {"q", "k", "gate", "up", "down"}), ("fold", {"gate", "up", "down"})]
)
def test_maps_that_compression_changes_are_quantised_anew(
    method: str, kept: set[str], pair: Callable[..., Pair]
) -> None:
    both = pair(gptq(), gptq_config())
    options = ("--weights", "int4", "--kv-heads", "1", "--method", method)
    bundle, report, err = built(both.quantized, *options)
    taken = report["source_weights"]["layers"][1]
    assert {name for name, each in taken.items() if each == "kept"} == kept
    assert {each for each in taken.values() if each != "kept"} == {"changed by compression"}
    written, wanted = weights_of(bundle), stored(load_decoder(both.floats).layers[1])
    for name in kept:
        rows, expected = (np.sort(each, 0) for each in (written[f"{name}1"], wanted[name]))
        assert np.array_equal(rows, expected)  # heads may have another order
    assert "quantised anew (changed by compression)" in err
    assert report["validation"]["failures"] == []


def test_weights_that_are_kept_leave_no_choice_of_bits(pair: Callable[..., Pair]) -> None:
    both = pair(gptq(), gptq_config())
    options = ("--weights", "int4", "--kv-heads", "1", "--method", "online", *TABLES_IN_FLOATS)
    bundle, report, _ = built(both.quantized, *options, "--weight-bits", "10")
    assert set(report["weight_bits"]["eight_bits"]) == {"0.v", "0.o", "1.v", "1.o"}
    formats = {share.format for layer in Bundle.open(bundle).weights.layers for share in layer}
    assert formats == {WeightFormat("int4", 32), WeightFormat("int8")}


def test_parameters_do_not_count_codes(pair: Callable[..., Pair]) -> None:
    both = pair(gptq(), gptq_config())
    options = ("--weights", "int4", "--kv-heads", "1", "--weight-method", "nearest")
    _, report, _ = built(both.quantized, *options)
    _, expected, _ = built(both.floats, *options, name="floats-bundle")
    assert report["parameters"] == expected["parameters"]
    assert report["parameters_original"] == expected["parameters_original"]


def test_another_block_is_quantised_anew(pair: Callable[..., Pair]) -> None:
    both = pair(gptq(), gptq_config())
    options = ("--weights", "int4", *ALL_HEADS, "--weight-method", "nearest")
    bundle, _, err = built(both.quantized, *options, "--weight-block", "64")
    assert "int4, blocks of 32, where --weight-block 64 asks for int4, blocks of 64" in err
    assert not equal_maps(bundle, both.floats)
    same, _, _ = built(both.quantized, *options, "--weight-block", "32", name="same")
    assert equal_maps(same, both.floats) == MAPS


@pytest.mark.parametrize(
    ("pack", "config", "reason"),
    [
        (awq(), AWQ_CONFIG, "asymmetric (zero points)"),
        (gptq(symmetric=False), gptq_config(sym=False), "asymmetric (zero points)"),
        (gptq(act_order=True), gptq_config(desc_act=True), "act-order"),
        (gptq(8, 32), gptq_config(8, 32), "int8, blocks of 32, to be stored as int4"),
        (gptq(4, 16), gptq_config(4, 16), "blocks of a bundle are of 32, 64, 128"),
    ],
)
def test_what_a_bundle_cannot_store_is_quantised_anew_with_the_reason(
    pack: Pack, config: dict[str, Any], reason: str, pair: Callable[..., Pair]
) -> None:
    both = pair(pack, config)
    bundle, report, err = built(both.quantized, "--weights", "int4", *ALL_HEADS, "--weight-method", "nearest")
    assert reason in err and "0 of 14" in err
    assert all(reason in each for layer in report["source_weights"]["layers"] for each in layer.values())
    assert not equal_maps(bundle, both.floats)


def test_saturated_codes_are_reported_apart(pair: Callable[..., Pair]) -> None:
    def change(integers: Integers) -> Integers:
        return replace(integers, scales=-integers.scales)

    both = pair(gptq(change=change), gptq_config())
    options = ("--weights", "int4", *ALL_HEADS, "--weight-method", "nearest")
    _, report, err = built(both.quantized, *options)
    assert "0 of 14 linear maps keep their codes and scales; 14 keep them but for the lowest code" in err
    assert all("lowest code" in each for each in report["source_weights"]["layers"][0].values())
    assert report["validation"]["failures"] == []


def test_int8_by_row_is_kept(pair: Callable[..., Pair]) -> None:
    pytest.importorskip("compressed_tensors")
    both = pair(compressed(8, -1, name="int-quantized"), compressed_config(8, -1, name="int-quantized"))
    bundle, report, _ = built(both.quantized, "--weights", "int8", *TABLES_IN_FLOATS, *ALL_HEADS)
    assert equal_maps(bundle, both.floats) == MAPS and report["quantization"]["mean_kl"] == 0


def test_int4_is_not_kept_as_int8(pair: Callable[..., Pair]) -> None:
    both = pair(gptq(), gptq_config())
    _, _, err = built(both.quantized, "--weights", "int8", *ALL_HEADS, "--weight-method", "nearest")
    assert "int4, blocks of 32, to be stored as int8, by row" in err


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_are_rounded_to_the_dtype_of_the_graph(dtype: str, pair: Callable[..., Pair]) -> None:
    both = pair(gptq(), gptq_config())
    bundle, report, _ = built(both.quantized, "--weights", "int4", "--dtype", dtype, *ALL_HEADS)
    assert {each for layer in report["source_weights"]["layers"] for each in layer.values()} == {"kept"}
    assert report["validation"]["failures"] == []
    written, layer = weights_of(bundle), load_decoder(both.quantized, codes=True).layers[1]
    codes = layer.mlp.up.codes
    assert codes is not None
    scales = codes.scales.to(getattr(torch, dtype)).float()
    wanted = codes.codes.float() * scales.repeat_interleave(32, 1)
    assert np.array_equal(written["up1"], wanted.numpy())


def test_float_weights_are_those_of_the_dequantised_checkpoint(pair: Callable[..., Pair]) -> None:
    both = pair(gptq(), gptq_config())
    bundle, report, err = built(both.quantized, *ALL_HEADS)
    floats, _, _ = built(both.floats, *ALL_HEADS, name="floats-bundle")
    assert "are quantised (GPTQ, 4 bits, groups of 32): they are dequantised" in err
    assert report["source_weights"] == {"format": "GPTQ, 4 bits, groups of 32", "layers": [], "head": None}
    for name in (GRAPH_FILE, "decoder.onnx.data"):
        assert (bundle / name).read_bytes() == (floats / name).read_bytes()


def test_compress_writes_a_checkpoint_of_floats(pair: Callable[..., Pair]) -> None:
    both = pair(gptq(), gptq_config())
    output = both.quantized.parent / "compressed"
    options = ("-o", output, *CALIBRATION, "--kv-heads", "1", "--method", "fold", "--json")
    code, _, err = run_kvexport("compress", both.quantized, *options)
    assert code == 0 and "they are dequantised" in err
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    assert load_decoder(output).layers[0].attention.num_kv_heads == 1


def test_plan_counts_the_block_of_the_checkpoint(tiny_checkpoint: Make, edit_checkpoint: Make) -> None:
    def planned(path: Path) -> int:
        code, out, err = run_kvexport("plan", path, "--weights", "int4", "--json")
        assert code == 0, err
        return int(json.loads(out)["rows"][0]["formats"]["block"])

    sizes = {**SIZES, "hidden_size": 1024, "intermediate_size": 2048}
    source = tiny_checkpoint("llama", **sizes, num_hidden_layers=1)
    small = edit_checkpoint(source, config={"quantization_config": gptq_config(4, 32)})
    assert (planned(small), planned(source)) == (32, 64)
    code, _, err = run_kvexport(
        "plan", edit_checkpoint(source, config={"quantization_config": {"quant_method": "fp8"}})
    )
    assert code == 2 and "must be in a format that can be read" in err
