"""Every lowering of layers with eviction equals the reference after every token, slot by slot."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from support.combinations import representatives
from support.graph_decoders import BLOOM, LLAMA, QWEN2, Shape, make_decoder, mapped, quiet, slopes_of
from test_graph_evicting import CASES, disagreement, write

from kvexport.bundle.graph_io import present
from kvexport.errors import BundleError
from kvexport.eviction.config import POLICIES, Eviction
from kvexport.graph import GRAPH_FILE, GraphContract
from kvexport.graph.lowering import LOWERINGS, lower, lowered_contract
from kvexport.graph.lowering.primitives import OPERATORS
from kvexport.model.decoder import Decoder

LOWERED = [name for name in LOWERINGS if name != "std24"]
EVICTION = Eviction("l2-norm", 9, protect_first=1, protect_recent=3)
every_lowering = pytest.mark.parametrize("lowering", LOWERED)


def lowered(
    decoder: Decoder, directory: Path, lowering: str, eviction: Eviction = EVICTION, dtype: str = "float32"
) -> tuple[onnxruntime.InferenceSession, GraphContract]:
    contract = write(decoder, directory, eviction, dtype)
    path = directory / "lowered.onnx"
    ir.save(lower(directory / GRAPH_FILE, lowering), path)
    return session(path), lowered_contract(contract, lowering)


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, quiet(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("case", "lowering"), representatives(list(CASES), LOWERED))
def test_eviction_equals_the_reference_after_every_token(case: str, lowering: str, tmp_path: Path) -> None:
    style, shapes = CASES[case]
    decoder = make_decoder(shapes, style)
    assert disagreement(decoder, *lowered(decoder, tmp_path, lowering), EVICTION) < 5e-6


@pytest.mark.parametrize(("policy", "lowering"), representatives(list(POLICIES), LOWERED))
def test_every_policy_equals_the_reference_with_some_layers_without_eviction(
    policy: str, lowering: str, tmp_path: Path
) -> None:
    """With rows of unequal length, which evict at different steps."""
    decoder = make_decoder([Shape(4, 2), Shape(4, 4), Shape(4, 2)])
    eviction = Eviction(policy, 8, protect_recent=2, skip_layers=(1,))
    found = disagreement(decoder, *lowered(decoder, tmp_path, lowering, eviction), eviction, prompts=(6, 2))
    assert found < 5e-6


@every_lowering
def test_float16_equals_the_reference_if_rounding_changes_no_eviction(lowering: str, tmp_path: Path) -> None:
    decoder = mapped(
        make_decoder([Shape(4, 2), Shape(4, 4)]),
        lambda leaf: leaf.half().float() if leaf.is_floating_point() else leaf,
    )
    eviction = Eviction("window", 9, protect_first=1)
    assert disagreement(decoder, *lowered(decoder, tmp_path, lowering, eviction, "float16"), eviction) < 2e-2


@every_lowering
def test_lowered_graph_matches_its_contract(lowering: str, tmp_path: Path) -> None:
    decoder = make_decoder([Shape(4, 2), Shape(4, 4), Shape(4, 2)])
    _, contract = lowered(decoder, tmp_path, lowering, dataclasses.replace(EVICTION, skip_layers=(2,)))
    assert contract.variant == f"{lowering}-evicting"
    model = onnx.load(tmp_path / "lowered.onnx", load_external_data=False)
    for values, specs in ((model.graph.input, contract.inputs), (model.graph.output, contract.outputs)):
        for value, spec in zip(values, specs, strict=True):
            shape = tuple(d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim)
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
            assert (value.name, shape, dtype) == (spec.name, spec.shape, spec.dtype)


def test_decomposed17_outputs_only_the_new_tokens(tmp_path: Path) -> None:
    decoder = make_decoder([Shape(4, 2), Shape(4, 4)])
    contract = lowered_contract(
        write(decoder, tmp_path, dataclasses.replace(EVICTION, skip_layers=(1,))), "decomposed17"
    )
    assert [(spec.name, spec.dtype, spec.shape) for spec in contract.outputs[1:]] == [
        ("update.0.key", "float32", ("batch*2", 1, "sequence", 8)),
        ("update.0.value", "float32", ("batch*2", 1, "sequence", 8)),
        ("update.0.state", "float32", ("batch*2", 1, "sequence", 2)),
        ("slots.0", "int64", ("batch*2",)),
        ("update.1.key", "float32", ("batch", 4, "sequence", 8)),
        ("update.1.value", "float32", ("batch", 4, "sequence", 8)),
    ]
    assert lowered_contract(write(decoder, tmp_path, EVICTION), "std24").variant == "std24-evicting"


@pytest.mark.parametrize("case", CASES)
def test_decomposed17_is_valid_opset_17(case: str, tmp_path: Path) -> None:
    style, shapes = CASES[case]
    lowered(make_decoder(shapes, style), tmp_path, "decomposed17")
    onnx.checker.check_model(str(tmp_path / "lowered.onnx"), full_check=True)
    model = ir.load(tmp_path / "lowered.onnx")
    assert model.opset_imports == {"": 17}
    assert {node.op_type for node in model.graph} <= OPERATORS


def test_onnx_runtime_gets_the_fastest_form_for_each_layer(tmp_path: Path) -> None:
    shapes = [Shape(4, 4), Shape(4, 4), Shape(4, 2)]
    write(make_decoder(shapes), tmp_path, dataclasses.replace(EVICTION, skip_layers=(0,)))
    for lowering, attentions, products in (("ort-cpu", 0, 2), ("ort-cuda", 1, 1)):
        of = [node.op_type for node in lower(tmp_path / GRAPH_FILE, lowering).graph]
        assert (
            of.count("GroupQueryAttention") == 1 and of.count("TensorScatter") == 6
        )  # the caches that evict, in place
        assert (of.count("Attention"), of.count("Softmax")) == (attentions, products)


@every_lowering
def test_a_damaged_slot_choice_or_mask_is_detected(lowering: str, tmp_path: Path) -> None:
    """Negative control: another slot, a wrong mask, and attention to a slot that will be overwritten."""
    decoder = make_decoder([Shape(4, 2), Shape(4, 4)])
    _, contract = lowered(decoder, tmp_path, lowering)
    damages = {"ArgMax": "ArgMin"} if lowering != "decomposed17" else {"ArgMax": "ArgMin", "Not": "Identity"}
    for old, new in (*damages.items(), ("LessOrEqual", "GreaterOrEqual")):
        model = lower(tmp_path / GRAPH_FILE, lowering)
        nodes = [node for node in model.graph if node.op_type == old]
        assert nodes
        for node in nodes:
            node.op_type = new
        ir.save(model, tmp_path / "damaged.onnx")
        assert disagreement(decoder, session(tmp_path / "damaged.onnx"), contract, EVICTION) > 1e-2, old


def test_rejects_a_cache_without_its_state(tmp_path: Path) -> None:
    write(make_decoder([Shape(4, 2)]), tmp_path, EVICTION)
    model = ir.load(tmp_path / GRAPH_FILE)
    node = next(node for node in model.graph if node.name == present(0, "state"))
    node.outputs[0].name = "another"
    ir.save(model, tmp_path / "other.onnx")
    with pytest.raises(BundleError, match="attends to a budget of slots without a state"):
        lower(tmp_path / "other.onnx", "decomposed17")


def steps(
    session: onnxruntime.InferenceSession, contract: GraphContract, bound: bool, budget: int = 4
) -> list[list[int]]:
    """Run six tokens with bound or unbound buffers; the slots written in each head of each buffer."""
    sizes = {"batch": 1, "capacity": 16, "budget": budget, "batch*2": 2, "batch*4": 4}
    caches = {
        spec.name: onnxruntime.OrtValue.ortvalue_from_numpy(
            np.zeros([size if isinstance(size, int) else sizes[size] for size in spec.shape], spec.dtype)
        )
        for spec in contract.inputs
        if spec.name.startswith("past")
    }
    inputs = {entry.name for entry in session.get_inputs()}
    for step in range(6):
        tokens = {
            "input_ids": [[step]],
            "position_ids": [[step]],
            "write_indices": [min(step, budget)],
            "logits_index": [[0]],
        }
        binding = session.io_binding()
        for name in inputs & set(tokens):
            binding.bind_cpu_input(name, np.array(tokens[name]))
        for name, cache in caches.items():
            binding.bind_ortvalue_input(name, cache)
            if bound:
                binding.bind_ortvalue_output(name.replace("past_key_values", "present"), cache)
            else:
                binding.bind_output(name.replace("past_key_values", "present"))
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
    return [cache.numpy().any(axis=3).sum(axis=2).ravel().tolist() for cache in caches.values()]


@pytest.mark.parametrize(
    ("style", "lowering", "dtype"),
    representatives((LLAMA, BLOOM, QWEN2), ("std24", "ort-cpu"), ("float32", "float16")),
)
def test_bound_caches_and_states_are_written_in_place(
    style: str, lowering: str, dtype: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime warns if it copies a buffer, and only then."""
    slopes = slopes_of(4) if style is BLOOM else None
    decoder = make_decoder([Shape(4, 2, slopes=slopes), Shape(4, 4, slopes=slopes)], style)
    contract = write(decoder, tmp_path, Eviction("l2-norm", 4), dtype)
    path = tmp_path / "lowered.onnx"
    ir.save(lower(tmp_path / GRAPH_FILE, lowering), path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 2  # warnings
    running = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    capfd.readouterr()
    written = [[4] * 2] * 3 + [[4] * 4] * 3
    assert steps(running, contract, bound=True) == written
    assert "tensorscatter" not in capfd.readouterr().err
    assert steps(running, contract, bound=False) == [[0] * 2] * 3 + [[0] * 4] * 3
    assert capfd.readouterr().err.count("tensorscatter.cc") == 6 * 6
