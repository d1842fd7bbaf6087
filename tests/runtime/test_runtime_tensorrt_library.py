"""The real TensorRT-RTX on a machine without a GPU: what can be tested of the runtime's use of it.

The functions that the runtime calls exist, the engine's tensors are where the runtime expects them, and an
engine that does not load gives a clear error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.decoders import make_decoder
from support.simulated_device import (
    SimulatedContext,
    SimulatedDevice,
    SimulatedEngine,
    SimulatedRuntimeConfig,
    simulated_tensorrt,
)
from support.tiny_bundles import write_bundle

import kvexport.runtime
from kvexport.errors import CannotRunHere
from kvexport.model.decoder import Decoder
from kvexport.runtime import open_bundle

pytestmark = pytest.mark.tensorrt


@pytest.fixture(scope="module")
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx")


def test_simulated_api_equals_the_real_one(trt: Any) -> None:
    for simulated, real in (
        (SimulatedEngine, trt.ICudaEngine),
        (SimulatedContext, trt.IExecutionContext),
        (SimulatedRuntimeConfig, trt.IRuntimeConfig),
    ):
        public = {name for name in vars(simulated) if not name.startswith("_")} - {
            "shape"
        }  # the simulation's own
        assert public and {name for name in public if not hasattr(real, name)} == set()
    assert hasattr(trt.ICudaEngine, "get_aliased_input_tensor")
    stands_in = simulated_tensorrt(SimulatedDevice())
    for name in ("Runtime", "ILogger", "ExecutionContextAllocationStrategy", "EngineStat"):
        assert hasattr(stands_in, name) and hasattr(trt, name)
    assert trt.ExecutionContextAllocationStrategy.USER_MANAGED is not None
    assert trt.DynamicShapesKernelSpecializationStrategy.EAGER is not None
    assert trt.IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy.fset is not None
    assert trt.EngineStat.TOTAL_WEIGHTS_SIZE is not None


def test_tensorrt_has_all_that_the_runtime_calls(trt: Any) -> None:
    """By name, from the source code of the runtime."""
    folder = Path(kvexport.runtime.__file__).parent
    text = "".join(
        (folder / name).read_text(encoding="utf-8")
        for name in ("backends/tensorrt.py", "backends/tensorrt_loading.py")
    )
    for pattern, real in (
        (r"(?:loaded|_engine)\.([a-z_0-9]+)", trt.ICudaEngine),
        (r"context\.([a-z_0-9]+)\(", trt.IExecutionContext),
        (r"refitter\.([a-z_0-9]+)\(", trt.Refitter),
        (r"_trt\.([A-Z]\w+)", trt),
        (r"engine\.trt\.([A-Z]\w+)", trt),
        (r"(?<!kvexport\.)runtime\.([a-z_]+)", trt.Runtime),
        (r"config\.([a-z_]+)", trt.IRuntimeConfig),
    ):
        names = set(re.findall(pattern, text))
        assert names and {name for name in names if not hasattr(real, name)} == set(), pattern


@pytest.mark.parametrize("lowering", ["std24", "decomposed17"])
def test_all_inputs_and_outputs_are_in_device_memory(trt: Any, lowering: str, tmp_path: Path) -> None:
    """TensorRT needs tensors that determine shapes in host memory; these graphs have none."""
    from kvexport.engine.engine_graph import fix_sizes
    from kvexport.engine.library import load_library
    from kvexport.engine.plan import parse
    from kvexport.graph import lower

    graph = (
        write_bundle(tmp_path / "b", make_decoder("llama", dtype=torch.float32), dtype="float16")
        / "decoder.onnx"
    )
    model = lower(graph, lowering)
    fix_sizes(model, {"batch": 1, "capacity": 64})
    _, network, _ = parse(load_library("tensorrt-rtx"), model, graph)
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    tensors += [network.get_output(index) for index in range(network.num_outputs)]
    assert len(tensors) == 4 + 4 + 1 + 4
    assert {tensor.name for tensor in tensors if tensor.is_shape_tensor} == set()


@pytest.mark.slow
def test_load_error_quotes_tensorrt(
    trt: Any, decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real plan, and TensorRT's error on a machine without a driver."""
    from kvexport.devices.gpu import find_gpu
    from kvexport.engine.build import build_engine

    if find_gpu() is not None:
        pytest.skip("there is a GPU")
    bundle = write_bundle(tmp_path / "b", decoder, dtype="float16")
    build_engine(bundle, target="rtx-4090", compute_capabilities=["8.9"])
    monkeypatch.setattr(
        "kvexport.runtime.backends.cuda.Cuda", lambda: SimulatedDevice(compute_capability="8.9")
    )
    with pytest.raises(CannotRunHere, match=r"TensorRT 1\.\d+[.\d]* cannot load[\s\S]*(CUDA|driver)"):
        open_bundle(bundle, provider="tensorrt")
