"""Plans without weights: what TensorRT-RTX shows of refitting float and integer weights without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from support.decoders import make_decoder
from support.quantized_decoders import quantize_decoder
from support.tiny_bundles import write_bundle

from kvexport.bundle import GRAPH_FILE
from kvexport.bundle.engine_record import Profile
from kvexport.devices.gpu import find_gpu
from kvexport.engine import EngineOptions
from kvexport.engine.destination import Destination
from kvexport.engine.engine_graph import EngineGraph, prepare_graph
from kvexport.engine.monitor import BuildMonitor
from kvexport.engine.plan import build_plan, parse
from kvexport.errors import CannotRunHere
from kvexport.graph.lint import Parser
from kvexport.graph.lowering import lower
from kvexport.progress import Progress

pytestmark = pytest.mark.tensorrt

AHEAD = Destination("8.6", "tensorrt-rtx", ("8.6",), True)
TENSORRT_DTYPES = {"FLOAT": "FLOAT", "FLOAT16": "HALF", "INT8": "INT8", "INT4": "INT4"}


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[[str], Path]:
    """A function that writes a bundle with weights of a format."""

    def make(weights: str) -> Path:
        decoder = make_decoder("gqa", hidden=64, heads=4, head_dim=16, dtype=torch.float32)
        if weights != "float16":
            decoder = quantize_decoder(decoder, weights, block=32, dtype="float16")
        return write_bundle(tmp_path / "bundle", decoder, dtype="float16")

    return make


def fitted(bundle: Path, rtx: Any, lowering: str) -> EngineGraph:
    parser = Parser("tensorrt-rtx", rtx.version)
    return prepare_graph(bundle / GRAPH_FILE, parser, batch=1, capacity=64, chunk=8, lowering=lowering)


def weights_of(model: ir.Model) -> dict[str, str]:
    """TensorRT's dtype of each weight by name; INT64 are shapes and axes, which the parser reads."""
    initializers = model.graph.initializers.items()
    dtypes = {name: value.dtype.name for name, value in initializers if value.dtype is not None}
    return {name: TENSORRT_DTYPES[dtype] for name, dtype in dtypes.items() if dtype != "INT64"}


@pytest.mark.parametrize("lowering", ["std24", "decomposed17"])
@pytest.mark.parametrize("weights", ["float16", "int8", "int4"])
def test_each_weight_can_be_refitted_by_the_name_and_dtype_of_the_bundle(
    weights: str, lowering: str, rtx: Any, bundle: Callable[[str], Path]
) -> None:
    """As the runtime refits: it lowers the bundle's graph again, and TensorRT reads its initializers by name.

    TensorRT requires the dtype of the build, so that INT4 must have stayed INT4.
    """
    path = bundle(weights)
    _builder, network, _parser = parse(rtx, fitted(path, rtx, lowering).model, path / GRAPH_FILE)
    expected = weights_of(lower(path / GRAPH_FILE, lowering))
    assert [name for name in expected if not network.mark_weights_refittable(name)] == []
    assert not network.mark_weights_refittable("layers.9.mlp.up.weight")  # which the graph lacks
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    dtypes = {layer.name: layer.get_output(0).dtype.name for layer in layers if layer.type.name == "CONSTANT"}
    assert {name: dtypes[name] for name in expected} == expected
    integers = sum(dtype in ("INT8", "INT4") for dtype in expected.values())
    assert integers == (0 if weights == "float16" else 2 * 7 + 2)  # two layers, embedding and head


@pytest.mark.slow
@pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")
@pytest.mark.parametrize("weights", ["float16", "int8", "int4"])
def test_tensorrt_rtx_builds_without_weights_only_where_a_gpu_is(
    weights: str, rtx: Any, bundle: Callable[[str], Path]
) -> None:
    """The reason why `kvexport engine` refuses `--refit` ahead of time, whatever the weights are."""
    path = bundle(weights)
    graph = fitted(path, rtx, "std24")
    profiles = (Profile("decode", (1, 1, 2)), Profile("prefill", (1, 8, 8)))

    def build(refit: bool) -> Any:
        monitor, options = BuildMonitor(rtx.trt, Progress()).monitor, EngineOptions(refit=refit)
        return build_plan(rtx, graph.model, path / GRAPH_FILE, profiles, options, AHEAD, b"", monitor)

    assert memoryview(build(refit=False).serialized).nbytes > 0
    with pytest.raises(CannotRunHere, match=r"could not build[\s\S]*CUDA_SUCCESS"):
        build(refit=True)
