"""TensorRT-RTX builds graphs whose caches are rings, in each lowering; no GPU is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from support.graph_decoders import BLOOM, LLAMA, Shape, Style, make_decoder, slopes_of
from support.tiny_bundles import write_bundle

from kvexport.bundle import GRAPH_FILE
from kvexport.engine import EngineOptions, build_engine
from kvexport.engine.engine_graph import prepare_graph
from kvexport.eviction.config import Eviction
from kvexport.graph.lint import Parser
from kvexport.graph.nodes import sizes

pytestmark = pytest.mark.tensorrt

WINDOW, CAPACITY, CHUNK = 16, 96, 24


def bundle_of(folder: Path, style: Style = LLAMA, eviction: Eviction | None = None) -> Path:
    """Two layers with a window, one without, and one whose window is as large as the capacity.

    In this order TensorRT-RTX 1.7.1 does not build a graph whose slots of all tokens are numbered by Range.
    """
    slopes = slopes_of(4) if style is BLOOM else None
    windows = (WINDOW, WINDOW, None, CAPACITY)
    shapes = [Shape(kv_heads=2, head_dim=16, window=window, slopes=slopes) for window in windows]
    decoder = make_decoder(shapes, style)
    return write_bundle(folder / "bundle", decoder, dtype="float16", capacity=CAPACITY, eviction=eviction)


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["std24", "decomposed17"])
@pytest.mark.parametrize(
    ("style", "eviction"),
    [(LLAMA, None), (BLOOM, None), (LLAMA, Eviction("window", 32, skip_layers=(0, 1, 3)))],
    ids=["llama", "alibi", "evicting"],
)
def test_rings_build(
    style: Style, eviction: Eviction | None, lowering: str, rtx: Any, tmp_path: Path
) -> None:
    bundle = bundle_of(tmp_path, style, eviction)
    chunk = CHUNK if eviction is None else 8
    record = build_engine(
        bundle, EngineOptions(chunk=chunk, lowering=lowering), compute_capabilities=("8.9",)
    )
    assert (record.lowering, record.chunk, record.capacity) == (lowering, chunk, CAPACITY)
    updates = 8 if eviction is None else 9  # and the state of the layer that evicts
    assert record.layers.get("KV_CACHE_UPDATE", 0) == (updates if lowering == "std24" else 0)


@pytest.mark.parametrize(("capacity", "slots"), [(CAPACITY, WINDOW + CHUNK), (30, 30), (12, 12)])
def test_a_ring_has_the_window_and_the_longest_call(capacity: int, slots: int, tmp_path: Path) -> None:
    graph = bundle_of(tmp_path) / GRAPH_FILE
    parser = Parser("tensorrt", (11, 4))
    for lowering in ("std24", "decomposed17"):
        model = prepare_graph(graph, parser, batch=1, capacity=capacity, chunk=CHUNK, lowering=lowering).model
        keys = [sizes(value)[2] for value in model.graph.inputs if str(value.name).endswith(".key")]
        assert keys == [slots, slots, capacity, capacity]


def test_lint_reports_a_ring_whose_size_is_open(tmp_path: Path) -> None:
    """Negative control: without `prepare_graph` the rings have no size."""
    from kvexport.graph.lint import lint

    findings = lint(ir.load(bundle_of(tmp_path) / GRAPH_FILE), Parser("tensorrt", (11, 4)))
    assert any("past_key_values.0.key is not fixed" in finding.problem for finding in findings)
