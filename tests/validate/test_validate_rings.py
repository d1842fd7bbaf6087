"""Validation and self-test of layers whose cache is a ring: they wrap, pass, and find faults of a ring."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.command_line import run_kvexport
from support.decoders import make_decoder
from support.simulated_device import add_engine, only_gpu
from support.tiny_bundles import write_bundle
from support.validated_bundles import broken, edit_graph, export, node_of

from kvexport.bundle import Bundle
from kvexport.bundle.graph_io import LOWERED_FILES
from kvexport.progress import Progress
from kvexport.runtime.self_test import self_test
from kvexport.validate import validate_bundle, validate_graph


def replace_input(name: str, index: int, value: int) -> Callable[[ir.Graph], None]:
    """Replace an input of a node by a number."""

    def edit(graph: ir.Graph) -> None:
        number = ir.Value(name=f"{name}.other", const_value=ir.Tensor(np.array(value), name=f"{name}.other"))
        graph.register_initializer(number)
        node_of(graph, name).replace_input_with(index, number)

    return edit


DAMAGES = {
    "a window one token shorter": replace_input("ring_5.window_5.before", 1, 4),
    "a window one token longer": replace_input("ring_5.window_5.before", 1, 6),
    "positions of the wrong round": replace_input("ring_5.age", 1, 9),
    "writes to other slots": replace_input("ring_5.index", 1, 11),
    "the first token of a call as its last": replace_input("last_position", 1, 0),
}


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rings") / "bundle"
    export(path, make_decoder("window", dtype=torch.float32))
    return path


def test_a_valid_bundle_passes(valid: Path) -> None:
    bundle = Bundle.open(valid)
    assert any("window_5" in spec.shape for spec in bundle.graph.inputs)
    for report in (
        validate_graph(valid, bundle.graph, Progress()),
        validate_bundle(valid, Progress()),
    ):
        assert report.failures == ()
        assert {"key", "value", "attention", "logits"} <= set(report.compared)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_fault_of_a_ring_fails_validation(name: str, valid: Path, tmp_path: Path) -> None:
    bundle = broken(valid, tmp_path / "broken", edit_graph(DAMAGES[name]))
    assert validate_graph(bundle, Bundle.open(bundle).graph, Progress()).failures
    assert validate_bundle(bundle, Progress(), provider="cpu").failures


@pytest.mark.parametrize("provider", ["cpu", "cuda", "tensorrt"])
@pytest.mark.parametrize("lowering", ["std24", "decomposed17"])
def test_the_self_test_wraps_and_passes(
    provider: str, lowering: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_gpu(monkeypatch)
    path = write_bundle(tmp_path / "bundle", make_decoder("window", dtype=torch.float32), self_test=True)
    if provider == "tensorrt":
        add_engine(path, lowering=lowering)
    report = self_test(path, provider)
    assert (report.verdict, report.generated) == ("ok", report.continuation)


def test_the_self_test_finds_positions_of_the_wrong_round(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "bundle", make_decoder("window", dtype=torch.float32), self_test=True)
    (path / LOWERED_FILES["cpu"]).unlink()  # so that the graph that is damaged runs
    bundle = broken(path, tmp_path / "broken", edit_graph(DAMAGES["positions of the wrong round"]))
    assert self_test(bundle, "cpu").verdict != "ok"


def test_inspect_names_the_windows(valid: Path) -> None:
    code, out, _ = run_kvexport("inspect", valid)
    windows = [layer.window for layer in Bundle.open(valid).layers]
    assert (code, Bundle.open(valid).rings) == (0, windows)
    text = " ".join(out.split())
    assert f"window of 5 tokens {len(windows)} layers hold the window and one call, without loss" in text
