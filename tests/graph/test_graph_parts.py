"""The graph in parts: each has only its own weights, and in sequence they equal the whole graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from support.graph_decoders import (
    BLOOM,
    LLAMA,
    VOCAB,
    Caller,
    Shape,
    Style,
    distance,
    make_decoder,
    open_session,
    quiet,
    slopes_of,
    write,
)

from kvexport.graph import GRAPH_FILE, attention_tap, past, present, residual_tap
from kvexport.graph.split_layers import split_layers

TOKENS = {"position_ids", "write_indices"}


def _models(directory: Path, layers: int, in_float32: bool = False) -> list[onnx.ModelProto]:
    found = split_layers(directory / GRAPH_FILE, layers, in_float32=in_float32)
    return [onnx.load_model_from_string(part.model) for part in found]


def _names(values: object) -> list[str]:
    return [value.name for value in values]  # type: ignore[attr-defined]


def test_a_part_has_only_its_own_inputs_outputs_and_weights(tmp_path: Path) -> None:
    write(make_decoder([Shape(kv_heads=2), Shape(), Shape()]), tmp_path)
    embedding, *layers, head = _models(tmp_path, 3)
    assert (_names(embedding.graph.input), _names(embedding.graph.output)) == (["input_ids"], ["embedding"])
    assert (set(_names(head.graph.input)), _names(head.graph.output)) == (
        {residual_tap(2), "logits_index"},
        ["logits"],
    )
    for index, layer in enumerate(layers):
        stream = residual_tap(index - 1) if index else "embedding"
        caches = {
            past(index, "key"),
            past(index, "value"),
            past(0, "key"),
        }  # masks read the shape of the first key cache
        assert set(_names(layer.graph.input)) == TOKENS | {stream} | caches
        outputs = [attention_tap(index), residual_tap(index), present(index, "key"), present(index, "value")]
        assert _names(layer.graph.output) == outputs
        weights = {name for name in _names(layer.graph.initializer) if not name.startswith("int64")}
        assert (
            all(name.startswith((f"layers.{index}.", "rope.")) for name in weights)
            and len(weights) == 2 + 7 + 2
        )
    external = sum(
        bool(weight.external_data) for part in (embedding, *layers, head) for weight in part.graph.initializer
    )
    whole = onnx.load(tmp_path / GRAPH_FILE, load_external_data=False)
    assert (
        external == sum(bool(weight.external_data) for weight in whole.graph.initializer) + 2 * 2
    )  # tables, twice more


@pytest.mark.parametrize(
    ("style", "shape", "dtype"),
    [
        pytest.param(LLAMA, Shape(kv_heads=2, group=2, key_dim=8), "float32", id="llama"),
        pytest.param(Style(tied=True), Shape(window=3, qk_norm=True), "float16", id="window"),
        pytest.param(BLOOM, Shape(slopes=slopes_of(4)), "float32", id="bloom"),
    ],
)
def test_parts_in_sequence_equal_the_whole_graph(
    style: Style, shape: Shape, dtype: str, tmp_path: Path
) -> None:
    contract = write(make_decoder([shape] * 2, style), tmp_path, dtype)
    whole = Caller(open_session(tmp_path), contract, 2, 12)
    ids = torch.randint(0, VOCAB, (2, 6))
    wanted = whole(ids, [0, 2])
    values = {**Caller(open_session(tmp_path), contract, 2, 12).caches, "input_ids": ids.numpy()}
    values |= {"position_ids": np.array([[0], [2]]) + np.arange(6), "write_indices": np.array([0, 2])}
    values["logits_index"] = np.tile(np.arange(6), (2, 1))
    for part in split_layers(tmp_path / GRAPH_FILE, 2, in_float32=False):
        session = part.session(quiet())
        outputs = _names(session.get_outputs())
        given = session.run(outputs, {name: values[name] for name in _names(session.get_inputs())})
        values |= dict(zip(outputs, given, strict=True))
    tolerance = 1e-6 if dtype == "float32" else 5e-3  # a whole float16 graph is not rounded between its parts
    for name, array in wanted.items():
        assert distance(values[name], array) < tolerance


def test_a_float32_part_widens_only_its_own_weights(tmp_path: Path) -> None:
    write(make_decoder([Shape(), Shape()]), tmp_path, "bfloat16")
    for index, part in enumerate(split_layers(tmp_path / GRAPH_FILE, 2, in_float32=True)):
        names = (
            {"embedding.weight"}
            if index == 0
            else {"final_norm.weight", "head.weight"}
            if index == 3
            else set(part.weights)
        )
        assert set(part.weights) == names
        assert all(name.startswith(("rope.", f"layers.{index - 1}.")) for name in names) or index in (0, 3)
        model = onnx.load_model_from_string(part.model)
        narrow = onnx.TensorProto.BFLOAT16
        assert all(
            value.type.tensor_type.elem_type != narrow for value in (*model.graph.input, *model.graph.output)
        )
        assert all(weight.data_type != narrow for weight in model.graph.initializer)
