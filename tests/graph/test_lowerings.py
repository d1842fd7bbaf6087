"""Every lowering equals the reference for every family and form of attention, and has its postconditions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from support.combinations import representatives
from support.graph_decoders import Shape, disagreement, make_decoder, quiet, rounded, write
from test_graph_equals_reference import DECODERS

from kvexport.bundle.graph_io import DATA_FILE, LOWERED_FILES, attention_residual, residual_tap
from kvexport.errors import BundleError, UsageError
from kvexport.graph import GRAPH_FILE, GraphContract
from kvexport.graph.lowering import LOWERINGS, lower, lowered_contract, write_lowered
from kvexport.graph.lowering.primitives import OPERATORS, Primitives
from kvexport.graph.taps import GraphCopy, with_taps
from kvexport.model.decoder import Decoder

LOWERED = [name for name in LOWERINGS if name != "std24"]
everything = pytest.mark.parametrize(
    ("lowering", "name"), [(each, name) for each in LOWERED for name in DECODERS]
)
some = pytest.mark.parametrize(("lowering", "name"), representatives(LOWERED, list(DECODERS)))


def lowered(
    decoder: Decoder, directory: Path, lowering: str, dtype: str = "float32"
) -> tuple[GraphCopy, GraphContract]:
    contract = write(decoder, directory, dtype)
    path = directory / "lowered.onnx"
    ir.save(lower(directory / GRAPH_FILE, lowering), path)
    return with_taps(path), lowered_contract(contract, lowering)


@everything
def test_float32_equals_the_reference(lowering: str, name: str, tmp_path: Path) -> None:
    copy, contract = lowered(DECODERS[name], tmp_path, lowering)
    assert disagreement(DECODERS[name], copy.session(quiet()), contract, fill=3.0) < 5e-6


@some
def test_float16_equals_the_reference_on_the_same_weights(lowering: str, name: str, tmp_path: Path) -> None:
    copy, contract = lowered(DECODERS[name], tmp_path, lowering, "float16")
    assert (
        disagreement(rounded(DECODERS[name], torch.float16), copy.session(quiet()), contract, fill=3.0) < 5e-3
    )


@some
def test_lowered_graph_is_valid_and_matches_its_contract(lowering: str, name: str, tmp_path: Path) -> None:
    _, contract = lowered(DECODERS[name], tmp_path, lowering)
    model = onnx.load(tmp_path / "lowered.onnx", load_external_data=False)
    if lowering == "decomposed17":
        onnx.checker.check_model(str(tmp_path / "lowered.onnx"), full_check=True)
    for values, specs in ((model.graph.input, contract.inputs), (model.graph.output, contract.outputs)):
        for value, spec in zip(values, specs, strict=True):
            shape = tuple(d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim)
            assert (value.name, shape) == (spec.name, spec.shape)
    assert (tmp_path / DATA_FILE).stat().st_size == (
        write_again(DECODERS[name], tmp_path / "again") / DATA_FILE
    ).stat().st_size


def write_again(decoder: Decoder, directory: Path) -> Path:
    write(decoder, directory)
    return directory


@pytest.mark.parametrize("name", DECODERS)
def test_decomposed17_is_opset_17_and_expands_no_key_to_the_query_heads(name: str, tmp_path: Path) -> None:
    decoder = DECODERS[name]
    lowered(decoder, tmp_path, "decomposed17")
    model = ir.load(tmp_path / "lowered.onnx")
    assert model.opset_imports == {"": 17}
    assert {node.op_type for node in model.graph} <= OPERATORS
    for index, layer in enumerate(decoder.layers):
        if layer.attention.num_kv_heads == layer.attention.num_heads:
            continue
        for node in model.graph:
            for value in node.outputs:
                assert value.shape is not None
                sizes = [d if isinstance(d, int) else d.value for d in value.shape]
                expanded = (
                    len(sizes) == 4 and sizes[1] == layer.attention.num_heads and sizes[2] == "capacity"
                )
                assert not expanded, (
                    f"{value.name} of layer {index} is as large as the keys of all query heads"
                )


def test_the_same_graph_is_lowered_to_the_same_bytes(tmp_path: Path) -> None:
    write(DECODERS["online"], tmp_path)
    for lowering in LOWERED:
        first, second = (
            ir.to_proto(lower(tmp_path / GRAPH_FILE, lowering)).SerializeToString(deterministic=True)
            for _ in "ab"
        )
        assert first == second


# a capacity whose keys of one head, 8 wide, do not fit the processor's cache
LARGE = (1 << 20) // (8 * 4) + 1


def test_onnx_runtime_gets_the_fastest_form_for_each_layer(tmp_path: Path) -> None:
    cases = {
        "unshared": ("llama-mha", LARGE),
        "shared": ("llama-gqa-tied", 64),
        "long": ("llama-gqa-tied", LARGE),
    }
    operators = {}
    for which, (name, capacity) in cases.items():
        write(DECODERS[name], tmp_path / which, capacity=capacity)
        operators[which] = Counter(
            node.op_type for node in lower(tmp_path / which / GRAPH_FILE, "ort-cpu").graph
        )
    for which in ("unshared", "shared"):
        assert operators[which]["GroupQueryAttention"] == 2 and operators[which]["Softmax"] == 0
    assert operators["long"]["GroupQueryAttention"] == 0 and operators["long"]["Softmax"] == 2
    assert operators["long"]["TensorScatter"] == 4  # the cache is written in place


def test_long_shared_heads_equal_the_reference(tmp_path: Path) -> None:
    decoder = DECODERS["llama-gqa-tied"]
    contract = lowered_contract(write(decoder, tmp_path, capacity=LARGE), "ort-cpu")
    ir.save(lower(tmp_path / GRAPH_FILE, "ort-cpu"), tmp_path / "lowered.onnx")
    session = with_taps(tmp_path / "lowered.onnx").session(quiet())
    assert disagreement(decoder, session, contract, fill=3.0) < 5e-6


def test_sums_are_normalised_where_they_are_computed(tmp_path: Path) -> None:
    """The first norm has no sum before it, and the last one reads the chosen tokens only."""
    write(DECODERS["llama-mha"], tmp_path)
    graph = lower(tmp_path / GRAPH_FILE, "ort-cpu").graph
    counts = Counter(node.op_type for node in graph)
    assert counts["SkipSimplifiedLayerNormalization"] == 3 and counts["RMSNormalization"] == 2
    names = {value.name for node in graph for value in node.outputs}
    assert {attention_residual(0), residual_tap(0)} <= names  # taps are found by name


def test_rotation_is_merged_into_group_query_attention(tmp_path: Path) -> None:
    def rotations(decoder: Decoder) -> int:
        write(decoder, tmp_path)
        return sum(
            node.op_type == "RotaryEmbedding" for node in lower(tmp_path / GRAPH_FILE, "ort-cuda").graph
        )

    assert rotations(DECODERS["llama-mha-16"]) == 0
    assert (
        rotations(DECODERS["llama-mha"]) == 4
    )  # of width 8, which the operator attends to but does not rotate
    assert rotations(DECODERS["online"]) == 4  # rotated before they are mapped


@pytest.mark.parametrize(("dtype", "device"), [("float32", "cpu"), ("float16", "cuda"), ("bfloat16", "cuda")])
def test_lowering_for_onnx_runtime_is_written_beside_the_graph(
    dtype: str, device: str, tmp_path: Path
) -> None:
    write(DECODERS["llama-mha"], tmp_path, dtype)
    before = (tmp_path / DATA_FILE).read_bytes()
    write_lowered(tmp_path / GRAPH_FILE, dtype)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        [GRAPH_FILE, DATA_FILE, LOWERED_FILES[device]]
    )
    assert (tmp_path / DATA_FILE).read_bytes() == before


def test_unknown_lowering_lists_the_known_ones(tmp_path: Path) -> None:
    write(DECODERS["llama-mha"], tmp_path)
    with pytest.raises(UsageError, match="std24, decomposed17, ort-cpu, ort-cuda"):
        lower(tmp_path / GRAPH_FILE, "opset9")


@pytest.mark.parametrize("lowering", LOWERED)
def test_rejects_a_graph_of_another_form(lowering: str, tmp_path: Path) -> None:
    write(DECODERS["llama-mha"], tmp_path)
    model = ir.load(tmp_path / GRAPH_FILE)
    attention = next(node for node in model.graph if node.op_type == "Attention")
    attention.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
    ir.save(model, tmp_path / "other.onnx")
    with pytest.raises(BundleError, match=r"layers\.0\.attention\.mixed does not have the standard form"):
        lower(tmp_path / "other.onnx", lowering)


def test_passes_check_their_postconditions(tmp_path: Path) -> None:
    write(DECODERS["llama-mha"], tmp_path)
    with pytest.raises(ir.passes.PostconditionError, match=r"present\.0\.key is still in the graph"):
        Primitives()(ir.load(tmp_path / GRAPH_FILE))  # the caches were not split off first


@pytest.mark.parametrize("lowering", LOWERED)
def test_a_mask_that_shows_unwritten_slots_is_detected(lowering: str, tmp_path: Path) -> None:
    """Negative control: attention to unwritten slots is far from the reference."""
    decoder = make_decoder([Shape(kv_heads=2), Shape(kv_heads=2)])
    write(decoder, tmp_path)
    model = lower(tmp_path / GRAPH_FILE, lowering)
    damaged = False
    for node in model.graph:
        if node.op_type == "LessOrEqual":
            node.op_type, damaged = "GreaterOrEqual", True
    if not damaged:  # GroupQueryAttention has no mask to damage: lengthen it
        name = "gqa.last_slot"
        node = next(node for node in model.graph if node.name == name)
        node.op_type = "Add"
    ir.save(model, tmp_path / "damaged.onnx")
    contract = lowered_contract(write(decoder, tmp_path), lowering)
    assert (
        disagreement(decoder, with_taps(tmp_path / "damaged.onnx").session(quiet()), contract, fill=3.0)
        > 1e-2
    )


def test_numbers_in_hidden_slots_change_no_bit(tmp_path: Path) -> None:
    """Logits have the same bits whatever a slot holds before it is written."""
    for lowering in LOWERED:
        copy, contract = lowered(DECODERS["llama-gqa-tied"], tmp_path, lowering)
        session = copy.session(quiet())
        assert {
            disagreement(DECODERS["llama-gqa-tied"], session, contract, fill=fill) for fill in (0.0, 1e4)
        } == {disagreement(DECODERS["llama-gqa-tied"], session, contract, fill=-7.0)}
