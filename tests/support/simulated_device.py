"""A simulated GPU and a simulated TensorRT, to test which memory the runtime uses, when, and in which order.

The device's memory is host memory; queued work runs only when the host waits for it. The engine runs a
bundle's lowered graph with ONNX Runtime on the CPU, on the values at its addresses. Both fail where the real
ones are silent: at memory that was never allocated or is freed, at sizes outside of the profile, at writes
beyond the cache, and at work that a capture does not allow.
"""

from __future__ import annotations

import enum
import hashlib
import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from kvexport.bundle import Bundle
from kvexport.bundle.engine_record import (
    BuildRecord,
    PlanFile,
    Profile,
    engine_directory,
    write_record,
)
from kvexport.bundle.graph_io import BUDGET, CAPACITY, GRAPH_FILE, ring_sizes
from kvexport.graph import lower

CHUNK = 16
_GARBAGE = 0xFF  # a NaN in every float
_DTYPES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64"}


class SimulatedDevice:
    """A simulated `kvexport.runtime.cache.device_arrays.Device`.

    Attributes:
        done: names of the operations in the order in which they ran.
        allocations: number of allocations.
    """

    kind = "cpu"  # what ONNX Runtime must be told, since the memory is the host's
    name = "Simulated"
    stream = 77

    def __init__(self, total: int = 1 << 30, compute_capability: str = "8.7") -> None:
        self.compute_capability = compute_capability
        self.total = total
        self.used = 0
        self.allocations = 0
        self.done: list[str] = []
        self.capturing = False
        self.capturable = True
        self._memory: dict[int, NDArray[np.uint8]] = {}  # by address
        self._queue: list[tuple[str, Callable[[], None]]] = []
        self._kept: list[Any] = []

    def allocate(self, count: int) -> int:
        assert not self.capturing, "allocation while a graph is captured"
        if self.used + count > self.total:
            raise MemoryError(f"{count} bytes")
        self.allocations += 1
        whole = np.full(count + 512, _GARBAGE, np.uint8)
        address = -(-whole.ctypes.data // 256) * 256
        offset = address - whole.ctypes.data
        self._memory[address] = whole[offset : offset + count]
        self.used += count
        return address

    def free(self, address: int) -> None:
        self.synchronize()  # as cudaFree does
        self.used -= len(self._memory.pop(address))

    def pinned(self, count: int) -> NDArray[np.uint8]:
        assert not self.capturing, "allocation while a graph is captured"
        self.allocations += 1
        return np.full(count, _GARBAGE, np.uint8)

    def at(self, address: int, count: int) -> NDArray[np.uint8]:
        """Memory of the device; AssertionError unless it is inside one allocation."""
        for base, memory in self._memory.items():
            if base <= address and address + count <= base + len(memory):
                return memory[address - base : address - base + count]
        raise AssertionError(f"{count} bytes at {address:#x} are not the device's")

    def clear(self, address: int, count: int) -> None:
        def do() -> None:
            self.at(address, count)[...] = 0

        self.queue("clear", do)

    def upload(self, address: int, source: NDArray[Any]) -> None:
        assert source.flags.c_contiguous

        def do() -> None:
            self.at(address, source.nbytes)[...] = source.view(np.uint8).ravel()

        self.queue("upload", do)

    def download(self, target: NDArray[Any], address: int) -> None:
        assert target.flags.c_contiguous

        def do() -> None:
            target.view(np.uint8).reshape(-1)[...] = self.at(address, target.nbytes)

        self.queue("download", do)

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int
    ) -> None:
        assert width <= min(target_pitch, source_pitch)

        def do() -> None:
            for row in range(rows):
                self.at(target + row * target_pitch, width)[...] = self.at(source + row * source_pitch, width)

        self.queue("copy_rows", do)

    def queue(self, name: str, do: Callable[[], None]) -> None:
        self._queue.append((name, do))

    def synchronize(self) -> None:
        assert not self.capturing, "waiting while a graph is captured"
        queued, self._queue = self._queue, []
        for name, do in queued:
            self.done.append(name)
            do()

    def capture(self, work: Callable[[], None]) -> Any | None:
        assert not self._queue, "a capture begins with nothing queued"
        self.capturing = True
        try:
            work()
        finally:
            self.capturing = False
        captured, self._queue = self._queue, []
        return captured if self.capturable else None

    def launch(self, graph: Any) -> None:
        self.queue("launch", lambda: None)
        self._queue.extend(graph)

    def memory(self) -> tuple[int, int]:
        return self.total - self.used, self.total


class _Strategy(enum.Enum):
    STATIC = 0
    USER_MANAGED = 2


class _Location(enum.Enum):
    DEVICE = 0
    HOST = 1

    def __str__(self) -> str:
        return f"TensorLocation.{self.name}"


class _ILogger:
    INTERNAL_ERROR, ERROR, WARNING = 0, 1, 2

    def __init__(self) -> None: ...


_DataType = enum.Enum("_DataType", ["FLOAT", "HALF", "BF16", "INT64"])


def simulated_tensorrt(device: SimulatedDevice, version: str = "10.16.2", aliasing: bool = True) -> Any:
    """A simulated package tensorrt of `version`; before 10.15 it has no query for `aliasing`."""

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, plan: Any) -> SimulatedEngine | None:
            try:
                return SimulatedEngine(device, json.loads(bytes(plan)), aliasing)
            except ValueError:
                self._logger.log(_ILogger.ERROR, "magic tag does not match")
                return None

    class Refitter:
        def __init__(self, engine: SimulatedEngine, logger: Any) -> None:
            self.engine, self.read = engine, (set[tuple[Any, ...]](), "")

        def refit_cuda_engine(self) -> bool:
            weights, path = self.read
            complete = self.engine.weights_of_plan <= weights
            self.engine.has_weights = complete and path == self.engine.plan["graph"]
            return self.engine.has_weights

    class OnnxParserRefitter:
        def __init__(self, refitter: Refitter, logger: Any) -> None:
            self._refitter = refitter

        def refit_from_bytes(self, model: bytes, path: str) -> bool:
            graph = ir.from_proto(onnx.ModelProto.FromString(model)).graph
            self._refitter.read = signatures(graph), path
            return Path(path).is_file()

    module = ModuleType("tensorrt")
    module.__spec__ = ModuleSpec("tensorrt", None)
    module.__dict__.update(
        __version__=version,
        Runtime=Runtime,
        ILogger=_ILogger,
        ExecutionContextAllocationStrategy=_Strategy,
        EngineStat=SimpleNamespace(TOTAL_WEIGHTS_SIZE=0),
        Refitter=Refitter,
        OnnxParserRefitter=OnnxParserRefitter,
    )
    return module


def signatures(graph: ir.Graph) -> set[tuple[Any, ...]]:
    """Name, dtype and shape of each weight: a refit must have those of the build."""
    values = graph.initializers.items()
    return {(name, value.dtype, () if value.shape is None else tuple(value.shape)) for name, value in values}


class SimulatedEngine:
    """A graph with fixed capacity and batch, and two profiles."""

    def __init__(self, device: SimulatedDevice, plan: dict[str, Any], aliasing: bool) -> None:
        self.device, self.plan = device, plan
        self.weights = np.zeros(plan["weights"], np.uint8)
        self.has_weights = not plan["stripped"]
        device.allocate(plan["weights"])
        model = lower(Path(plan["graph"]), plan["lowering"])
        self.weights_of_plan = signatures(model.graph)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        folder = str(Path(plan["graph"]).parent)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        self.session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.sizes = {size for value in self.inputs.values() for size in value.shape}
        self.rings = ring_sizes(self.sizes, plan["capacity"], plan["chunk"])
        if aliasing:
            self.get_aliased_input_tensor = self._aliased

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_location(self, name: str) -> _Location:
        return _Location.DEVICE

    def get_tensor_dtype(self, name: str) -> Any:
        return _DataType[_DTYPES[(self.inputs | self.outputs)[name].type]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape(name, {})

    def shape(self, name: str, sizes: dict[str, int]) -> tuple[int, ...]:
        known = {CAPACITY: self.plan["capacity"], BUDGET: self.plan["budget"], **self.rings, **sizes}

        def size(of: int | str) -> int:
            if isinstance(of, int):
                return of
            _, times, heads = of.partition("batch")  # of one sequence
            return int(heads.removeprefix("*") or 1) if times else known.get(of, -1)

        return tuple(map(size, (self.inputs | self.outputs)[name].shape))

    @property
    def device_memory_size_v2(self) -> int:
        return 5000

    def get_engine_stat(self, stat: Any) -> int:
        return len(self.weights)

    def create_runtime_config(self) -> SimulatedRuntimeConfig:
        return SimulatedRuntimeConfig()

    def create_execution_context(self, how: _Strategy | SimulatedRuntimeConfig) -> SimulatedContext:
        config = how if isinstance(how, SimulatedRuntimeConfig) else SimulatedRuntimeConfig(how)
        assert config.allocation is _Strategy.USER_MANAGED
        return SimulatedContext(self, config)

    def _aliased(self, name: str) -> str | None:
        past = name.replace("present", "past_key_values")
        return past if past != name else None


class SimulatedRuntimeConfig:
    def __init__(self, allocation: _Strategy = _Strategy.STATIC) -> None:
        self.allocation = allocation
        self.dynamic_shapes_kernel_specialization_strategy = "LAZY"

    def set_execution_context_allocation_strategy(self, strategy: _Strategy) -> None:
        self.allocation = strategy


class SimulatedContext:
    def __init__(self, engine: SimulatedEngine, config: SimulatedRuntimeConfig) -> None:
        self.engine, self.device, self.config = engine, engine.device, config
        self.profile: int | None = None
        self.addresses: dict[str, int] = {}
        self.sizes: dict[str, tuple[int, ...]] = {}
        self.scratch: tuple[int, int] | None = None
        self.ran = False

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == self.device.stream
        self.profile = profile
        return True

    def set_device_memory(self, address: int, count: int) -> None:
        self.device.at(address, count)
        self.scratch = address, count

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        least, most = ((1, 2), (1, self.engine.plan["chunk"]))[self.profile]
        if len(shape) != 2 or shape[0] != 1 or not least <= shape[1] <= most:
            return False
        self.sizes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if address % 256:
            return False
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self.device.stream
        assert self.profile is not None and self.scratch is not None
        assert self.scratch[1] >= self.engine.device_memory_size_v2
        assert not self.device.capturing or self.ran, "the first run of a context cannot be captured"
        self.ran = True
        addresses, sizes = (
            dict(self.addresses),
            dict(self.sizes),
        )  # what a captured graph will use, whatever comes later
        self.device.queue("engine", lambda: self._execute(addresses, sizes))
        return True

    def _execute(self, addresses: dict[str, int], sizes: dict[str, tuple[int, ...]]) -> None:
        engine = self.engine
        assert engine.has_weights, "an engine without its weights"
        tokens, logits = sizes["input_ids"][1], sizes["logits_index"][1]
        assert sizes["position_ids"] == sizes["input_ids"]
        dims = {"sequence": tokens, "logits": logits}
        given = {name: self._array(name, addresses, dims) for name in engine.inputs}
        start, budget = int(given["write_indices"][0]), engine.plan["budget"]
        if budget is not None:
            assert start <= budget if tokens == 1 else start + tokens <= budget, "a write beyond the budget"
            start = (
                int(given["position_ids"][0, 0]) if CAPACITY in engine.sizes else 0
            )  # where the other layers write
        first = int(given["position_ids"][0, 0])
        ends = [start + tokens - engine.plan["capacity"]]
        ends += [first % slots + tokens - slots for slots in engine.rings.values()]
        assert max(ends) <= 0, "a write beyond the cache, which TensorRT would drop"
        made = engine.session.run(list(engine.outputs), {name: array.copy() for name, array in given.items()})
        for name, values in zip(engine.outputs, made, strict=True):
            self._array(name, addresses, dims)[...] = values

    def _array(self, name: str, addresses: dict[str, int], dims: dict[str, int]) -> NDArray[Any]:
        shape = self.engine.shape(name, dims)
        dtype = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64}[
            self.engine.get_tensor_dtype(name).name
        ]
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.device.at(addresses[name], count).view(dtype).reshape(shape)


def add_engine(
    bundle: Path,
    *,
    lowering: str = "std24",
    target: str = "simulated",
    capacity: int | None = None,
    graph: Path | None = None,
    **changes: Any,
) -> Path:
    """Add a simulated engine to a bundle, with the record of a build; `changes` are of the record.

    The engine computes `graph`; with another graph than the bundle's it is a wrong engine.
    """
    opened = Bundle.open(bundle)
    directory = engine_directory(bundle, target)
    directory.mkdir(parents=True)
    capacity = capacity or opened.capacity
    plan = {
        "graph": str(graph or bundle / GRAPH_FILE),
        "lowering": lowering,
        "capacity": capacity,
        "chunk": CHUNK,
        "budget": None if opened.eviction is None else min(opened.eviction.budget, capacity),
        "weights": 4096,
        "stripped": bool(changes.get("options", {}).get("refit")),
    }
    content = json.dumps(plan).encode()
    (directory / "decoder.plan").write_bytes(content)
    values: dict[str, Any] = {
        "kvexport": "0",
        "manifest_sha256": opened.digest,
        "target": target,
        "engine": "tensorrt",
        "version": "10.16.2",
        "lowering": lowering,
        "compute_capability": ("8.7",),
        "dtype": opened.dtype,
        "batch": 1,
        "capacity": plan["capacity"],
        "chunk": CHUNK,
        "profiles": (Profile("decode", (1, 1, 2)), Profile("prefill", (1, CHUNK, CHUNK))),
        "decomposed": (),
        "options": {},
        "plan": PlanFile(hashlib.sha256(content).hexdigest(), len(content)),
        "layers": {},
        "weights_bytes": 4096,
        "activation_bytes": None,
        "timing_cache_bytes": 0,
        "peak_host_bytes": 0,
        "seconds": 0.0,
    }
    write_record(directory, BuildRecord(**{**values, **changes}))
    return directory


def onnxruntime_on(device: SimulatedDevice, monkeypatch: Any) -> None:
    """Use ONNX Runtime's CPU provider in place of CUDA, with the memory of `device`."""
    monkeypatch.setattr("kvexport.runtime.backends.cuda.Cuda", lambda: device)
    monkeypatch.setattr("kvexport.runtime.backends.ort_session.CUDA", "CPUExecutionProvider")
    monkeypatch.setattr(
        "kvexport.runtime.backends.ort_session._PROVIDERS",
        {"cpu": ["CPUExecutionProvider"], "cuda": ["CPUExecutionProvider"]},
    )


def only_gpu(monkeypatch: Any) -> SimulatedDevice:
    """A simulated GPU, for a simulated TensorRT and for ONNX Runtime's CUDA."""
    device = SimulatedDevice()
    onnxruntime_on(device, monkeypatch)
    monkeypatch.setitem(sys.modules, "tensorrt", simulated_tensorrt(device))
    return device
