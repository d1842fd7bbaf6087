"""The graph file is standard, complete, minimal, deterministic, and equals its contract."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from support.graph_decoders import BLOOM, LLAMA, Shape, make_decoder, quiet, slopes_of, write

from kvexport.errors import UsageError
from kvexport.files.schema import Table
from kvexport.graph import DATA_FILE, GRAPH_FILE, GraphContract, render
from kvexport.model.decoder import Decoder

ONLINE = Shape(heads=4, kv_heads=2, group=2, key_dim=8, value_dim=12, value_map=True)
DECODERS = {
    "llama": make_decoder([Shape(kv_heads=2), Shape(qk_norm=True, window=3)]),
    "online": make_decoder([ONLINE, Shape(kv_heads=1)], dataclasses.replace(LLAMA, tied=True)),
    "bloom": make_decoder([Shape(6, 6, slopes=slopes_of(6))] * 2, BLOOM),
}
DTYPES = ("float32", "float16", "bfloat16")
everything = pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name in DECODERS for dtype in DTYPES]
)


@everything
def test_onnx_checker_passes(name: str, dtype: str, tmp_path: Path) -> None:
    write(DECODERS[name], tmp_path, dtype)
    onnx.checker.check_model(str(tmp_path / GRAPH_FILE), full_check=True)


def test_onnx_checker_rejects_a_wrong_declared_shape(tmp_path: Path) -> None:
    write(DECODERS["llama"], tmp_path)
    model = ir.load(tmp_path / GRAPH_FILE)
    value = next(node.outputs[0] for node in model.graph if node.name == "layers.0.attention.q.heads")
    value.shape = ir.Shape(("batch", "sequence", 5, 8))
    ir.save(model, tmp_path / GRAPH_FILE)
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.checker.check_model(str(tmp_path / GRAPH_FILE), full_check=True)


@everything
def test_only_the_default_domain_and_nothing_unused(name: str, dtype: str, tmp_path: Path) -> None:
    write(DECODERS[name], tmp_path, dtype)
    model = onnx.load(tmp_path / GRAPH_FILE, load_external_data=False)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 24)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions and not model.metadata_props
    used = Counter(name for node in model.graph.node for name in node.input)
    made = [name for node in model.graph.node for name in node.output]
    outputs = {output.name for output in model.graph.output}
    assert len(made) == len(set(made)) and len({node.name for node in model.graph.node}) == len(made)
    assert {initializer.name for initializer in model.graph.initializer} <= used.keys()
    assert {value.name for value in model.graph.input} <= used.keys()
    assert all(name in used or name in outputs for name in made)
    assert "Identity" not in {node.op_type for node in model.graph.node}


@everything
def test_no_node_is_repeated(name: str, dtype: str, tmp_path: Path) -> None:
    write(DECODERS[name], tmp_path, dtype)
    model = onnx.load(tmp_path / GRAPH_FILE, load_external_data=False)
    counts = Counter(
        (
            node.op_type,
            tuple(node.input),
            tuple(attribute.SerializeToString() for attribute in node.attribute),
        )
        for node in model.graph.node
    )
    assert max(counts.values()) == 1


@pytest.mark.parametrize("name", DECODERS)
def test_declared_shapes_and_dtypes_equal_those_of_a_run(name: str, tmp_path: Path) -> None:
    contract = write(DECODERS[name], tmp_path)
    model = ir.load(tmp_path / GRAPH_FILE)
    values = [output for node in model.graph for output in node.outputs]
    model.graph.outputs.extend(value for value in values if value not in model.graph.outputs)
    sizes = {"batch": 2, "sequence": 3, "logits": 4, "capacity": 7, "window_3": 5, "batch*logits": 8}
    feeds = {
        spec.name: np.zeros(
            [sizes[size] if isinstance(size, str) else size for size in spec.shape], spec.dtype
        )
        for spec in contract.inputs
    }
    options = quiet()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(tmp_path))
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    found = dict(
        zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True)
    )
    assert len(found) == len(values)
    for value in values:
        assert value.name is not None and value.shape is not None and value.dtype is not None
        wanted = [size if isinstance(size, int) else sizes[str(size.value)] for size in value.shape]
        assert list(found[value.name].shape) == wanted, value.name
        assert found[value.name].dtype == value.dtype.numpy(), value.name


@everything
def test_contract_equals_the_file(name: str, dtype: str, tmp_path: Path) -> None:
    contract = write(DECODERS[name], tmp_path, dtype, capacity=50)
    graph = ir.load(tmp_path / GRAPH_FILE).graph
    for specs, values in ((contract.inputs, graph.inputs), (contract.outputs, graph.outputs)):
        assert [spec.name for spec in specs] == [value.name for value in values]
        for spec, value in zip(specs, values, strict=True):
            assert value.shape is not None and value.dtype is not None
            assert spec.shape == tuple(size if isinstance(size, int) else size.value for size in value.shape)
            assert spec.dtype == value.dtype.numpy().name
    assert (contract.variant, contract.opset, contract.dtype, contract.capacity) == ("std24", 24, dtype, 50)
    assert contract.num_layers == 2
    assert GraphContract.from_table(Table(json.loads(json.dumps(contract.to_json())), "graph")) == contract


def test_layers_with_equal_masks_share_one(tmp_path: Path) -> None:
    slopes = slopes_of(4)
    shapes = [
        Shape(slopes=slopes),
        Shape(slopes=slopes[::-1]),
        Shape(slopes=slopes),
        Shape(slopes=slopes, window=64),  # the capacity: the slots of the others
    ]
    write(make_decoder(shapes, BLOOM), tmp_path)
    text = render(tmp_path / GRAPH_FILE)
    assert [text.count(f"{op}(") for op in ("Where", "LessOrEqual", "Greater", "Range")] == [3, 1, 1, 1]
    masks = [line.rsplit(", ", 1)[1].split(")")[0] for line in text.splitlines() if "= Attention(" in line]
    assert masks == [f"layers.{layer}.attention.alibi" for layer in (0, 1, 0, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_decoder_gives_the_same_bytes(dtype: str, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write(DECODERS["online"], tmp_path / folder, dtype)
    for name in (GRAPH_FILE, DATA_FILE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    sizes = {}
    for tied in (False, True):
        folder = tmp_path / str(tied)
        write(make_decoder([Shape()], dataclasses.replace(LLAMA, tied=tied)), folder)
        sizes[tied] = sum(
            value.const_value.nbytes for value in ir.load(folder / GRAPH_FILE).graph.initializers.values()
        )  # type: ignore[union-attr]
    embedding = 4 * make_decoder([Shape()]).embedding.weight.numel()
    assert abs(sizes[False] - sizes[True] - embedding) < 100  # shapes of the reshapes around Gemm


@pytest.mark.parametrize(("dtype", "capacity"), [("int8", 16), ("float32", 0)])
def test_rejects_unknown_dtype_and_zero_capacity(dtype: str, capacity: int, tmp_path: Path) -> None:
    decoder: Decoder = DECODERS["llama"]
    with pytest.raises(UsageError):
        write(decoder, tmp_path, dtype, capacity)
    assert not list(tmp_path.iterdir())
