"""`kvexport.plan.sizes`: counts equal those of published models, of conversion and of the bundle writer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.anchors import CONFIGS, PARAMETERS
from support.conversions import plain
from support.quantized_decoders import quantize_decoder
from support.tiny_bundles import decoder_with_fewer_heads, write_bundle

from kvexport.bundle.formats import WeightFormats, default_block, resolve_formats
from kvexport.bundle.manifest import read_manifest
from kvexport.errors import BundleError, CheckpointError, UsageError
from kvexport.files.resources import resource
from kvexport.model.decoder import tensors_of
from kvexport.model.loader import load_decoder
from kvexport.plan import plan
from kvexport.plan.sizes import TrainedSizes, bundle_sizes, trained_sizes
from kvexport.plan.weights import Precision, bundle_precision, least_bits, precision

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    ),
    ("mistral", {"head_dim": 16}),
    ("qwen2", {}),
    ("qwen3", {"num_key_value_heads": 4}),
    ("bloom", {}),
    ("opt", {}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
]
TinyCheckpoint = Callable[..., Path]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_model_has_its_published_parameters(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    trained = trained_sizes(tmp_path)
    assert trained.with_kv_heads(trained.architecture.num_kv_heads).parameters == PARAMETERS[name]


def test_reads_a_config_by_its_own_path(tmp_path: Path) -> None:
    path = tmp_path / "qwen.json"
    path.write_text(json.dumps(CONFIGS["Qwen3-0.6B"]))
    assert trained_sizes(path).architecture.hidden_size == 1024


def count_numbers(decoder: Any, layers: Any) -> int:
    """Numbers in a decoder's tensors; ALiBi's slopes and rotary frequencies are constants, not weights."""
    ends = decoder.embedding, decoder.final_norm, decoder.output_projection, decoder.head
    outside = [tensor for part in ends for tensor in tensors_of(part)]
    slopes = [layer.attention.alibi_slopes for layer in layers if layer.attention.alibi_slopes is not None]
    return sum(t.numel() for t in outside + [t for layer in layers for t in tensors_of(layer)]) - sum(
        s.numel() for s in slopes
    )


@pytest.mark.parametrize(("family", "config"), FAMILIES)
def test_parameters_equal_those_of_the_checkpoint(
    tiny_checkpoint: TinyCheckpoint, family: str, config: dict[str, Any]
) -> None:
    path = tiny_checkpoint(family, **config)
    decoder, trained = load_decoder(path), trained_sizes(path)
    sizes = trained.with_kv_heads(trained.architecture.num_kv_heads)
    assert sizes.parameters == count_numbers(decoder, decoder.layers)
    assert sizes.kv_width == sum(layer.attention.kv_width for layer in decoder.layers)
    assert not sizes.maps


@pytest.mark.parametrize(("family", "config"), FAMILIES)
def test_parameters_equal_those_of_a_conversion(
    tiny_checkpoint: TinyCheckpoint, family: str, config: dict[str, Any]
) -> None:
    path = tiny_checkpoint(family, **config)
    decoder, trained = load_decoder(path), trained_sizes(path)
    windows = torch.randint(0, 60, (16, 24), generator=torch.Generator().manual_seed(0))
    layers = [
        each.layer for each in plain(decoder, windows, trained.architecture.num_kv_heads // 2, "online")
    ]
    sizes = trained.with_kv_heads(trained.architecture.num_kv_heads // 2)
    assert sizes.parameters == count_numbers(decoder, layers)
    assert sizes.kv_width == sum(layer.attention.kv_width for layer in layers)
    assert sizes.maps == any(layer.attention.key_map is not None for layer in layers)


def test_sizes_need_no_weights(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    config = json.loads((tiny_checkpoint("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert trained_sizes(tmp_path).with_kv_heads(2) == trained_sizes(tiny_checkpoint("llama")).with_kv_heads(
        2
    )


@pytest.mark.parametrize("kv_heads", [0, 3, 8, -2])
def test_kv_heads_must_divide_the_trained_number(tiny_checkpoint: TinyCheckpoint, kv_heads: int) -> None:
    with pytest.raises(UsageError, match="divide"):
        trained_sizes(tiny_checkpoint("llama", num_key_value_heads=4)).with_kv_heads(kv_heads)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mamba"},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"intermediate_size": "wide"},
        {"quantization_config": {"quant_method": "awq"}},
    ],
)
def test_rejects_a_config_that_build_rejects(
    tiny_checkpoint: TinyCheckpoint, edit_checkpoint: Any, change: dict
) -> None:
    with pytest.raises(CheckpointError):
        trained_sizes(edit_checkpoint(tiny_checkpoint("llama"), change))


def test_rejects_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it has no config"):
        trained_sizes(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_of_a_bundle_equal_its_file(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, tied: bool
) -> None:
    checkpoint = tiny_checkpoint("llama", num_key_value_heads=4, tie_word_embeddings=tied, vocab_size=320)
    path = write_bundle(tmp_path / "bundle", decoder_with_fewer_heads(checkpoint), dtype="float16")
    manifest = read_manifest(path)
    sizes = bundle_sizes(path, manifest)
    assert sizes.weight_bytes(precision("float16")).total == manifest.files["decoder.onnx.data"].bytes
    assert sizes.head == (0 if tied else 320 * 32)
    assert sizes.kv_width * 2 == manifest.kv_bytes_per_token
    assert sizes.max_positions == manifest.capacity


def test_rejects_a_bundle_without_tie_word_embeddings(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """Bundles that were built before the key existed still open and run; only a plan needs it."""
    decoder = load_decoder(tiny_checkpoint("llama"))
    path = write_bundle(tmp_path / "b", decoder, change=lambda raw: raw["model"].pop("tie_word_embeddings"))
    manifest = read_manifest(path)
    assert manifest.model.tie_word_embeddings is None
    with pytest.raises(BundleError, match=r"must say whether the head is tied[\s\S]*kvexport build"):
        bundle_sizes(path, manifest)


def test_a_bundle_is_as_large_as_was_planned(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """A plan from config.json leaves out only the alignment of the file and the rotary tables."""
    path = tiny_checkpoint(
        "llama", hidden_size=128, intermediate_size=256, vocab_size=2048, num_hidden_layers=3
    )
    bundle = write_bundle(tmp_path / "bundle", load_decoder(path), dtype="float32")
    planned = trained_sizes(path).with_kv_heads(2).weight_bytes(precision("float32")).total
    written = read_manifest(bundle).files["decoder.onnx.data"].bytes
    assert planned < written < 1.05 * planned


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["int4", "int8"])
def test_planned_bytes_of_integer_weights_are_those_of_the_file(
    name: str, tied: bool, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """From config.json alone, with scales, embedding, head and rotary tables; and of the bundle itself."""
    path = tiny_checkpoint(
        "llama",
        hidden_size=192,  # no multiple of 128
        intermediate_size=512,
        head_dim=64,
        vocab_size=600,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    decoder = quantize_decoder(load_decoder(path), name, block=default_block(192))
    bundle = write_bundle(tmp_path / "bundle", decoder, capacity=64)
    stored = (bundle / "decoder.onnx.data").stat().st_size
    sizes = trained_sizes(path)
    formats = precision("float32", WeightFormats(name, name, name, default_block(192)))
    planned = sizes.with_kv_heads(2).weight_bytes(formats)
    assert planned.total == pytest.approx(stored, rel=0.01)
    manifest = read_manifest(bundle)
    exact = bundle_sizes(bundle, manifest)
    parts = exact.weight_bytes(bundle_precision(manifest))
    assert parts.total == stored
    assert (parts.embedding, parts.head) == (planned.embedding, planned.head)
    assert parts.layers == pytest.approx(planned.layers, rel=0.06)  # small maps are padded
    assert parts.scales == pytest.approx(planned.scales, rel=0.25)  # maps of unknown shapes
    assert exact.matrices == sum(rows * columns * n for (rows, columns), n in _shapes(sizes).items())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_demo_model_in_int4_is_as_large_as_was_planned(dtype: str, tmp_path: Path) -> None:
    """From its config.json, and from the bundle."""
    demo = resource("models", "demo")
    trained = trained_sizes(demo)
    block = default_block(trained.architecture.hidden_size)
    decoder = quantize_decoder(load_decoder(demo), "int4", block=block, dtype=dtype)
    capacity = trained.architecture.max_positions
    bundle = write_bundle(tmp_path / "bundle", decoder, dtype=dtype, capacity=capacity)
    stored = (bundle / "decoder.onnx.data").stat().st_size
    least = min_bits(demo, dtype)
    of_demo = plan(demo, None, dtype=dtype, weights=["int4"], weight_bits=least)
    for planned in (of_demo, plan(bundle, None)):
        row = planned.rows[0]
        assert row.memory.weights == row.weights.total == pytest.approx(stored, rel=0.02)
        assert row.formats.summary == "int4"
    (float_row, *_) = plan(demo, None, dtype=dtype, weights=[dtype]).rows
    assert float_row.memory.weights > 2 * stored


def test_more_bits_than_any_weight_has_are_all_in_int8() -> None:
    demo = resource("models", "demo")
    rows = [plan(demo, None, weights=["int4"], weight_bits=bits).rows[0] for bits in (40.0, 1e308)]
    assert rows[0].memory.weights == rows[1].memory.weights


def min_bits(model: Path, dtype: str) -> float:
    """--weight-bits that gives no weight 8 bits."""
    trained = trained_sizes(model)
    it = trained.architecture
    formats = resolve_formats(dtype, tied=it.tied, hidden_size=it.hidden_size, weights="int4")
    return least_bits(Precision(dtype, formats), trained.with_kv_heads(it.num_kv_heads).tables)


def _shapes(sizes: TrainedSizes) -> Mapping[tuple[int, int], int]:
    return sizes.with_kv_heads(2).shapes
