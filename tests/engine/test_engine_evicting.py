"""TensorRT-RTX builds layers with eviction for every style, policy and lowering; no GPU is needed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from support.combinations import representatives
from support.decoders import STYLES, make_decoder
from support.tiny_bundles import decoder_with_fewer_heads, write_bundle

from kvexport.bundle import GRAPH_FILE, Bundle
from kvexport.bundle.engine_record import BuildRecord
from kvexport.engine import EngineOptions, build_engine
from kvexport.engine.engine_graph import EngineGraph, fix_sizes, prepare_graph
from kvexport.engine.preflight import require_options
from kvexport.errors import UsageError
from kvexport.eviction.config import POLICIES, Eviction
from kvexport.graph.lint import Parser, refusals
from kvexport.progress import Progress

RTX = Parser("tensorrt-rtx", (1, 7, 1))
SMS = ("8.6", "8.9", "12.0")
EVICTION = Eviction("l2-norm", 32, protect_first=1, protect_recent=4)
NATIVE = ("KV_CACHE_UPDATE", "ATTENTION_INPUT")


@pytest.fixture
def evicting(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a bundle with eviction: two layers with four heads of 16."""

    def make(
        style: str = "llama",
        eviction: Eviction = EVICTION,
        *,
        dtype: str = "float16",
        capacity: int = 64,
        **sizes: Any,
    ) -> Path:
        decoder = make_decoder(style, dtype=torch.float32, **{"head_dim": 16, **sizes})
        return write_bundle(tmp_path / "bundle", decoder, dtype=dtype, capacity=capacity, eviction=eviction)

    return make


def built(bundle: Path, **options: Any) -> BuildRecord:
    return build_engine(bundle, EngineOptions(**options), compute_capabilities=SMS)


def native(record: BuildRecord) -> list[int]:
    return [record.layers.get(name, 0) for name in NATIVE]


@pytest.mark.slow
@pytest.mark.tensorrt
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("style", ["llama", "bloom"])
def test_eviction_builds_with_native_and_fused_layers(
    style: str, kv_heads: int, rtx: Any, evicting: Callable[..., Path]
) -> None:
    """A cache update for each key, value and state; attention stays fused."""
    record = built(evicting(style, kv_heads=kv_heads))
    assert (record.lowering, record.decomposed, native(record), record.chunk) == ("std24", (), [6, 2], 7)
    assert record.layers["TOPK"] == 2


@pytest.mark.slow
@pytest.mark.tensorrt
def test_decomposed17_builds(rtx: Any, evicting: Callable[..., Path]) -> None:
    record = built(evicting(kv_heads=2), lowering="decomposed17")
    assert (record.lowering, native(record), record.layers["TOPK"]) == ("decomposed17", [0, 0], 2)


@pytest.mark.slow
@pytest.mark.tensorrt
def test_layers_without_eviction_stay_native(rtx: Any, evicting: Callable[..., Path]) -> None:
    eviction = Eviction("l2-norm", 32, protect_recent=4, skip_layers=(0,))
    assert native(built(evicting(eviction=eviction, kv_heads=2))) == [5, 2]


@pytest.mark.slow
@pytest.mark.tensorrt
@pytest.mark.parametrize("lowering", ["std24", "decomposed17"])
def test_large_budgets_and_batches_build(lowering: str, rtx: Any, evicting: Callable[..., Path]) -> None:
    """The limit of 3840 of TensorRT's TopK is a limit of K, not of the input's size."""
    bundle = evicting(eviction=Eviction("l2-norm", 8192, protect_recent=32), capacity=16384, kv_heads=2)
    record = built(bundle, batch=2, lowering=lowering)
    assert (record.lowering, record.batch, record.chunk) == (lowering, 2, 128)


@pytest.mark.tensorrt
@pytest.mark.slow
@pytest.mark.parametrize(
    ("style", "policy", "lowering"),
    representatives(list(STYLES), list(POLICIES), ("std24", "decomposed17"), cover=(1, 2)),
)
def test_every_style_and_policy_builds(
    style: str, policy: str, lowering: str, rtx: Any, evicting: Callable[..., Path]
) -> None:
    """In float16, and for every other style in bfloat16."""
    dtype = ("float16", "bfloat16")[list(STYLES).index(style) % 2]
    bundle = evicting(style, Eviction(policy, 32, protect_first=1, protect_recent=4), dtype=dtype, kv_heads=2)
    record = built(bundle, lowering=lowering)
    assert record.compute_capability == SMS and record.plan.bytes > 0 and record.decomposed == ()
    assert native(record) == ([6, 2] if lowering == "std24" else [0, 0])


class Notes(Progress):
    """Collect notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.slow
@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("sizes", "dtype", "expected", "words"),
    [
        ({"head_dim": 36, "kv_heads": 2}, "float16", ("decomposed17", 0), "heads of 36 with a bool mask"),
        ({"heads": 1}, "float16", ("std24", 2), "no fused attention kernel for a single head"),
        ({"kv_heads": 2}, "float32", ("std24", 2), "no fused attention kernel takes FLOAT"),
    ],
)
def test_eviction_without_a_kernel_is_lowered_or_decomposed_with_a_note(
    sizes: dict[str, int],
    dtype: str,
    expected: tuple[str, int],
    words: str,
    rtx: Any,
    evicting: Callable[..., Path],
) -> None:
    notes = Notes()
    bundle = evicting(dtype=dtype, **sizes)
    record = build_engine(bundle, EngineOptions(), compute_capabilities=("8.9",), progress=notes)
    assert (record.lowering, len(record.decomposed)) == expected
    (note,) = notes.notes
    assert words in note


@pytest.mark.slow
@pytest.mark.tensorrt
def test_unequal_widths_fall_back_to_decomposed17(
    rtx: Any, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Keys of 12 and values of 16: compressed heads and eviction in one bundle."""
    decoder = decoder_with_fewer_heads(tiny_checkpoint("llama", num_key_value_heads=4))
    bundle = write_bundle(tmp_path / "bundle", decoder, dtype="float16", eviction=EVICTION)
    notes = Notes()
    record = build_engine(bundle, EngineOptions(), compute_capabilities=("8.9",), progress=notes)
    assert record.lowering == "decomposed17" and record.layers["TOPK"] == 2
    assert "keys are 12 wide and values 16" in notes.notes[0]


@pytest.mark.tensorrt
def test_network_has_the_sizes_of_the_budget(rtx: Any, evicting: Callable[..., Path]) -> None:
    from kvexport.engine.plan import parse

    bundle = evicting(kv_heads=2)
    fitted = prepare_graph(
        bundle / GRAPH_FILE, Parser(rtx.engine, rtx.version), batch=3, capacity=48, budget=20
    )
    _, network, _parser = parse(rtx, fitted.model, bundle / GRAPH_FILE)
    shapes = {
        tensor.name: tuple(tensor.shape) for tensor in map(network.get_input, range(network.num_inputs))
    }
    assert shapes["input_ids"] == (3, -1) and shapes["write_indices"] == (3,)
    assert shapes["past_key_values.1.value"] == (6, 1, 20, 16) and shapes["past_key_values.1.state"] == (
        6,
        1,
        20,
        2,
    )


def fitted(bundle: Path, parser: Parser, lowering: str | None = None, budget: int | None = 32) -> EngineGraph:
    return prepare_graph(bundle / GRAPH_FILE, parser, batch=1, capacity=64, budget=budget, lowering=lowering)


@pytest.mark.parametrize("version", [(10, 3), (10, 13)])
def test_older_versions_get_decomposed17(version: tuple[int, int], evicting: Callable[..., Path]) -> None:
    found = fitted(evicting(kv_heads=2), Parser("tensorrt", version))
    assert found.lowering == "decomposed17" and refusals(found.findings) == []
    assert any("TensorScatter" in finding.operator for finding in found.rejected["std24"])


def test_lint_reports_a_budget_that_is_not_fixed(evicting: Callable[..., Path]) -> None:
    """Negative control: the budget is left symbolic."""
    found = fitted(evicting(kv_heads=2), RTX, "std24", budget=None)
    assert len(refusals(found.findings)) == 6
    assert all(
        re.search("capacity of the cache .* is not fixed", finding.problem)
        for finding in refusals(found.findings)
    )


def test_every_cache_input_gets_its_size(evicting: Callable[..., Path]) -> None:
    model = ir.load(evicting(kv_heads=2) / GRAPH_FILE)
    fix_sizes(model, {"batch": 3, "budget": 20})
    shapes = {value.name: value.shape for value in model.graph.inputs}
    assert shapes["past_key_values.0.state"] == (6, 1, 20, 2) and shapes["input_ids"] == (3, "sequence")


def test_chunk_is_limited_by_the_eviction_budget(evicting: Callable[..., Path]) -> None:
    bundle = Bundle.open(evicting())
    assert require_options(EngineOptions(), bundle) == (64, 7)
    with pytest.raises(UsageError, match="must fit the bundle's --kv-budget") as caught:
        require_options(EngineOptions(chunk=8), bundle)
    assert "1 to 7" in str(caught.value)
    with pytest.raises(UsageError, match="must leave a token that can be evicted"):
        require_options(EngineOptions(capacity=5), bundle)
    assert require_options(EngineOptions(capacity=8), bundle) == (8, 7)
