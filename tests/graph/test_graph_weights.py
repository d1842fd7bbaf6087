"""The data file: content, alignment, rejected weights, memory."""

from __future__ import annotations

import dataclasses
import gc
import tracemalloc
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.graph_decoders import Shape, make_decoder, write

from kvexport.errors import UsageError
from kvexport.graph import DATA_FILE, GRAPH_FILE, DecoderWriter
from kvexport.graph import weights as weights_module
from kvexport.graph.weights import WeightFile
from kvexport.model.decoder import Decoder, Linear

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [64, 1 << 24])
def test_weights_are_rounded_to_nearest_for_every_block_size(
    dtype: str, block: int, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(weights_module, "_BLOCK", block)
    decoder = make_decoder([Shape(kv_heads=2)])
    write(decoder, tmp_path, dtype)
    stored = ir.load(tmp_path / GRAPH_FILE).graph.initializers
    attention = decoder.layers[0].attention
    for name, leaf in {
        "embedding.weight": decoder.embedding.weight,
        "layers.0.attention.k.weight": attention.k.weight.T,  # [in, out]
        "layers.0.mlp_norm.weight": decoder.layers[0].mlp_norm.weight,
    }.items():
        tensor = stored[name].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), leaf.numpy().astype(DTYPES[dtype]))
    np.testing.assert_array_equal(
        stored["embedding.weight"].const_value.numpy().astype(np.float32),  # type: ignore[union-attr]
        decoder.embedding.weight.to(getattr(torch, dtype)).float().numpy(),
    )


def test_rotary_tables_equal_those_of_trained_models(tmp_path: Path) -> None:
    decoder = make_decoder([Shape()])
    write(decoder, tmp_path, capacity=5000)
    rope = decoder.layers[0].attention.rope
    assert rope is not None
    angles = torch.arange(5000).float()[:, None] * rope.inv_freq  # float32 products, not exact ones
    stored = ir.load(tmp_path / GRAPH_FILE).graph.initializers
    for name, function in (("rope.cos", torch.cos), ("rope.sin", torch.sin)):
        tensor = stored[name].const_value
        assert tensor is not None and tensor.shape == (5000, 4)
        np.testing.assert_allclose(tensor.numpy(), function(angles.double()).float(), rtol=0, atol=1e-6)


def test_large_tensors_start_at_a_page_and_small_ones_at_a_cache_line(tmp_path: Path) -> None:
    file = WeightFile(tmp_path / "data", "float32")
    arrays = [np.full(size, size, dtype=np.float32) for size in (3, 5, 1024, 7, 4000, 1)]
    tensors = [file.append(str(index), array) for index, array in enumerate(arrays)]
    assert [tensor.offset for tensor in tensors] == [0, 64, 4096, 8192, 12288, 28288]
    for tensor, array in zip(tensors, arrays, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)


def _with_bad_weight(value: float) -> Decoder:
    decoder = make_decoder([Shape(), Shape()])
    layer = decoder.layers[1]
    weight = layer.attention.v.weight.clone()
    weight[3, 2] = value
    attention = dataclasses.replace(layer.attention, v=Linear(weight))
    return dataclasses.replace(
        decoder, layers=[decoder.layers[0], dataclasses.replace(layer, attention=attention)]
    )


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (65505.0, "float16", "tensor layers.1.attention.v.weight must fit float16"),
        (-7e4, "float16", "tensor layers.1.attention.v.weight must fit float16"),
        (3.4e38, "bfloat16", "must fit bfloat16"),
        (float("nan"), "float32", "tensor layers.1.attention.v.weight must be finite"),
        (float("-inf"), "float16", "must be finite"),
    ],
)
def test_rejects_a_weight_that_does_not_fit_by_name(
    value: float, dtype: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        write(_with_bad_weight(value), tmp_path, dtype)


@pytest.mark.parametrize(("value", "dtype"), [(65504.0, "float16"), (7e4, "bfloat16"), (3.4e38, "float32")])
def test_accepts_the_largest_weights_that_fit(value: float, dtype: str, tmp_path: Path) -> None:
    write(_with_bad_weight(value), tmp_path, dtype)


def test_writer_holds_no_reference_to_a_layer(tmp_path: Path) -> None:
    decoder = make_decoder([Shape()])
    writer = DecoderWriter(
        tmp_path,
        dtype="float32",
        capacity=8,
        dims=decoder.dims,
        embedding=decoder.embedding,
    )
    layer = make_decoder([Shape()]).layers[0]
    leaf = weakref.ref(layer.mlp.down.weight)
    writer.add_layer(layer)
    del layer
    gc.collect()
    assert leaf() is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_writing_uses_memory_for_one_block(dtype: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(weights_module, "_BLOCK", 1 << 16)
    weight = torch.ones(1024, 2048)  # 8 MiB
    file = WeightFile(tmp_path / DATA_FILE, dtype)
    tracemalloc.start()
    file.append("weight", np.asarray(weight).T)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
