"""Calls to CUDA: their arguments and error codes, with a simulated `cuda.bindings.runtime`."""

from __future__ import annotations

import ctypes
import enum
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.simulated_gpus import SimulatedGpu, simulate_gpus

from kvexport.errors import CannotRunHere
from kvexport.runtime.backends.cuda import Cuda, Graph


class _Error(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureInvalidated = 901


class Runtime(ModuleType):
    """Returns success for every call but those in `failing`, and records the arguments."""

    cudaError_t = _Error
    cudaStreamNonBlocking, cudaHostAllocDefault = 1, 0
    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice="H2D", cudaMemcpyDeviceToHost="D2H", cudaMemcpyDeviceToDevice="D2D"
    )
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread")

    def __init__(self) -> None:
        super().__init__("runtime")
        self.calls: list[tuple[Any, ...]] = []
        self.failing: dict[str, _Error] = {}
        self.answers: dict[str, tuple[Any, ...]] = {
            "cudaGetDeviceCount": (1,),
            "cudaDriverGetVersion": (12060,),
            "cudaRuntimeGetVersion": (13050,),
            "cudaStreamCreateWithFlags": (7,),
            "cudaMalloc": (4096,),
            "cudaMemGetInfo": (1000, 2000),
            "cudaStreamEndCapture": ("graph",),
            "cudaGraphInstantiate": ("executable",),
        }
        self.host = (ctypes.c_uint8 * 64)()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            if name in ("cudaGetErrorName", "cudaGetErrorString"):
                return _Error.cudaSuccess, arguments[0].name.encode()
            self.calls.append((name, *arguments))
            error = self.failing.get(name, _Error.cudaSuccess)
            if name == "cudaHostAlloc":
                return error, ctypes.addressof(self.host)
            answer = self.answers.get(name, ())
            return (error, *(answer if error is _Error.cudaSuccess else [None] * len(answer)))

        return call


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    simulate_gpus(monkeypatch, SimulatedGpu("Orin", "8.7"))
    made = Runtime()
    package, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
    bindings.runtime = made  # type: ignore[attr-defined]
    for name, module in (("cuda", package), ("cuda.bindings", bindings), ("cuda.bindings.runtime", made)):
        monkeypatch.setitem(sys.modules, name, module)
    return made


def test_describes_the_device(runtime: Runtime) -> None:
    device = Cuda()
    assert (device.name, device.compute_capability, device.stream, device.kind) == ("Orin", "8.7", 7, "cuda")
    assert device.memory() == (1000, 2000) and device.allocate(100) == 4096


def test_queues_copies_on_its_stream(runtime: Runtime) -> None:
    device, array = Cuda(), np.arange(6, dtype=np.int64)
    runtime.calls.clear()
    device.upload(4096, array)
    device.download(array, 8192)
    device.clear(4096, 48)
    device.copy_rows(1, 2, 3, 4, 5, 6)
    device.synchronize()
    host = array.ctypes.data
    assert runtime.calls == [
        ("cudaMemcpyAsync", 4096, host, 48, "H2D", 7),
        ("cudaMemcpyAsync", host, 8192, 48, "D2H", 7),
        ("cudaMemsetAsync", 4096, 0, 48, 7),
        ("cudaMemcpy2DAsync", 1, 2, 3, 4, 5, 6, "D2D", 7),
        ("cudaStreamSynchronize", 7),
    ]


def test_pinned_memory_is_an_array_and_is_freed(runtime: Runtime) -> None:
    memory = Cuda().pinned(64)
    view = memory.view(np.int64)[:2]
    view[:] = 5, 6
    assert bytes(runtime.host)[:16] == np.array([5, 6]).tobytes()
    del memory
    assert not any(call[0] == "cudaFreeHost" for call in runtime.calls)  # the view still needs it
    del view
    assert runtime.calls[-1] == ("cudaFreeHost", ctypes.addressof(runtime.host))


def test_graphs_are_captured_and_launched(runtime: Runtime) -> None:
    device = Cuda()
    runtime.calls.clear()
    graph = device.capture(device.synchronize)
    device.launch(graph)
    assert [call[0] for call in runtime.calls] == [
        "cudaStreamBeginCapture",
        "cudaStreamSynchronize",
        "cudaStreamEndCapture",
        "cudaGraphInstantiate",
        "cudaGraphDestroy",
        "cudaGraphLaunch",
    ]
    assert runtime.calls[-1] == ("cudaGraphLaunch", "executable", 7)
    del graph
    assert runtime.calls[-1] == ("cudaGraphExecDestroy", "executable")


def test_an_interrupt_ends_the_capture(runtime: Runtime) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    device = Cuda()
    with pytest.raises(KeyboardInterrupt):
        device.capture(interrupted)
    assert "cudaStreamEndCapture" in [call[0] for call in runtime.calls]


@pytest.mark.parametrize("failing", ["cudaStreamSynchronize", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_failed_capture_ends_and_returns_none(runtime: Runtime, failing: str) -> None:
    device = Cuda()
    runtime.failing[failing] = _Error.cudaErrorStreamCaptureInvalidated
    runtime.calls.clear()
    assert device.capture(device.synchronize) is None
    names = [call[0] for call in runtime.calls]
    assert "cudaStreamEndCapture" in names and names[-1] == "cudaGetLastError"
    assert ("cudaGraphInstantiate" in names) == (failing == "cudaGraphInstantiate")
    assert ("cudaGraphDestroy" in names) == (failing != "cudaStreamEndCapture")


def test_cuda_errors_become_kvexport_errors(runtime: Runtime) -> None:
    device = Cuda()
    runtime.failing = {
        "cudaMalloc": _Error.cudaErrorMemoryAllocation,
        "cudaStreamSynchronize": _Error.cudaErrorLaunchFailure,
    }
    with pytest.raises(MemoryError, match="100 bytes on Orin"):
        device.allocate(100)
    with pytest.raises(CannotRunHere, match=r"CUDA failed on Orin[\s\S]*cudaErrorLaunchFailure"):
        device.synchronize()


@pytest.mark.parametrize("call", ["upload", "download", "clear", "copy_rows", "launch", "memory", "pinned"])
def test_every_call_is_checked(runtime: Runtime, call: str) -> None:
    device, array = Cuda(), np.zeros(1)
    calls = {
        "upload": lambda: device.upload(1, array),
        "download": lambda: device.download(array, 1),
        "clear": lambda: device.clear(1, 1),
        "copy_rows": lambda: device.copy_rows(1, 1, 1, 1, 1, 1),
        "launch": lambda: device.launch(Graph("graph")),
        "memory": device.memory,
        "pinned": lambda: device.pinned(8),
    }
    names = (
        "cudaMemcpyAsync",
        "cudaMemsetAsync",
        "cudaMemcpy2DAsync",
        "cudaGraphLaunch",
        "cudaMemGetInfo",
        "cudaHostAlloc",
    )
    runtime.failing = dict.fromkeys(names, _Error.cudaErrorLaunchFailure)
    with pytest.raises(CannotRunHere, match="cudaErrorLaunchFailure"):
        calls[call]()


@pytest.mark.parametrize(
    ("error", "answers", "message"),
    [
        (_Error.cudaErrorInsufficientDriver, {"cudaDriverGetVersion": (0,)}, "no NVIDIA driver"),
        (
            _Error.cudaErrorInsufficientDriver,
            {},
            r"CUDA 12\.6[\s\S]*CUDA 13[\s\S]*pip install 'cuda-bindings<12\.7'",
        ),
        (_Error.cudaErrorNoDevice, {}, r"finds no GPU[\s\S]*cudaErrorNoDevice"),
        (_Error.cudaSuccess, {"cudaGetDeviceCount": (0,)}, r"finds no GPU[\s\S]*0 devices"),
    ],
)
def test_machines_without_a_gpu(
    runtime: Runtime, error: _Error, answers: dict[str, Any], message: str
) -> None:
    runtime.failing["cudaGetDeviceCount"] = error
    runtime.answers |= answers
    with pytest.raises(CannotRunHere, match=message):
        Cuda()


def test_missing_bindings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(CannotRunHere, match="pip install cuda-bindings"):
        Cuda()


def test_the_real_bindings_have_these_calls() -> None:
    """Every call has the right number and types of arguments; without a driver each returns an error."""
    real = pytest.importorskip("cuda.bindings.runtime")
    if real.cudaGetDeviceCount()[0] == real.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU: the addresses below are made up")
    with pytest.raises(CannotRunHere):
        Cuda()
    device: Any = object.__new__(Cuda)
    device.cuda, device.stream, device.name, array = real, 7, "none", np.zeros(4)
    for call in (
        lambda: device.allocate(8),
        lambda: device.upload(1, array),
        lambda: device.download(array, 1),
        lambda: device.clear(1, 8),
        lambda: device.copy_rows(1, 2, 3, 4, 5, 6),
        device.synchronize,
        device.memory,
        lambda: device.pinned(8),
        lambda: device.capture(lambda: None),
        lambda: device.launch(Graph(real.cudaGraphExec_t(0))),
    ):
        with pytest.raises(CannotRunHere, match=r"cudaErrorInsufficientDriver|cudaErrorNoDevice"):
            call()
