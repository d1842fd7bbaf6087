"""Loading a TensorRT engine.

Deserialise its plan, put in missing weights, and check it against its record.
"""

from __future__ import annotations

import mmap
from functools import cache
from typing import Any, NoReturn

from kvexport.bundle import GRAPH_FILE, Bundle
from kvexport.bundle.graph_io import (
    BATCH,
    BUDGET,
    CAPACITY,
    STATE,
    past,
    present,
    ring_sizes,
    sized,
    slots_output,
    update,
)
from kvexport.errors import BundleError, CannotRunHere
from kvexport.runtime.backends.base import TOKEN_INPUTS
from kvexport.runtime.backends.tensorrt_select import Engine

_TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64"}
_REBUILD = "build it again: kvexport engine BUNDLE --force"


def load_engine(engine: Engine, runtime: Any, log: Any) -> Any:
    """Deserialise an engine. Its plan is mapped, so that it is not in memory twice.

    Raises:
        CannotRunHere: TensorRT cannot load it.
    """
    if engine.record.options.get("version_compatible") and hasattr(runtime, "engine_host_code_allowed"):
        runtime.engine_host_code_allowed = True
    with engine.plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        loaded = runtime.deserialize_cuda_engine(plan)
    if loaded is None:
        version = engine.trt.__version__
        raise CannotRunHere(f"TensorRT {version} cannot load {engine.plan}", got=log.last(), fix=_REBUILD)
    return loaded


def refit(loaded: Any, engine: Engine, bundle: Bundle, log: Any) -> None:
    """Put the bundle's weights into an engine that was built without them.

    TensorRT's parser reads them by name from the graph that the engine was built from; a lowering has its own
    weights.

    Raises:
        CannotRunHere: weights are missing.
    """
    import onnx_ir as ir

    from kvexport.graph.lowering import lower

    path = bundle.path / GRAPH_FILE
    graph = ir.to_proto(lower(path, engine.record.lowering)).SerializeToString()
    refitter = engine.trt.Refitter(loaded, log)
    read = engine.trt.OnnxParserRefitter(refitter, log).refit_from_bytes(graph, str(path))
    if not read or not refitter.refit_cuda_engine():
        raise CannotRunHere(
            "TensorRT cannot put the bundle's weights into the engine",
            got=log.last(),
            fix="build it again, whole: kvexport engine BUNDLE --force",
        )


def require_contract(loaded: Any, engine: Engine, bundle: Bundle, in_place: bool) -> None:
    """Check the inputs and outputs of an engine.

    Raises:
        BundleError: they contradict its record or the bundle.
    """
    record = engine.record
    sizes = {BATCH: record.batch, CAPACITY: record.capacity}
    if bundle.eviction is not None:
        sizes[BUDGET] = min(bundle.eviction.budget, record.capacity)
    caches = [spec for spec in bundle.graph.inputs if spec.name not in TOKEN_INPUTS]
    sizes |= ring_sizes((axis for spec in caches for axis in spec.shape), record.capacity, record.chunk)
    shapes = {spec.name: (spec.dtype, tuple(sized(each, sizes) for each in spec.shape)) for spec in caches}
    outputs = {(present if in_place else update)(*layer_and_which(name)): name for name in shapes}
    names = {loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors)}
    states = [] if in_place else [layer_and_which(name)[0] for name in shapes if name.endswith(STATE)]
    expected = {*TOKEN_INPUTS, "logits", *shapes, *outputs, *map(slots_output, states)}
    if names != expected:
        _refuse(engine, "must have the inputs and outputs of its lowering", sorted(names ^ expected))
    for name in names:
        if not str(loaded.get_tensor_location(name)).endswith("DEVICE"):
            _refuse(engine, "must have all tensors in device memory", name)
    for name, (dtype, shape) in shapes.items():
        actual = _TYPES.get(loaded.get_tensor_dtype(name).name), tuple(loaded.get_tensor_shape(name))
        if actual != (dtype, shape):
            _refuse(engine, f"must match the bundle in {name}", actual, (dtype, shape))
    for name in (*TOKEN_INPUTS, "logits"):
        actual_type = _TYPES.get(loaded.get_tensor_dtype(name).name)
        expected_type = "float32" if name == "logits" else "int64"
        if actual_type != expected_type:
            _refuse(engine, f"must match the bundle in the type of {name}", actual_type, expected_type)
    if in_place and hasattr(loaded, "get_aliased_input_tensor"):
        for output, cache in outputs.items():
            if loaded.get_aliased_input_tensor(output) != cache:
                _refuse(
                    engine,
                    "must write the cache in place",
                    loaded.get_aliased_input_tensor(output),
                    f"{output} shares the memory of {cache}",
                )


def failure(log: Any, what: str) -> CannotRunHere:
    """An error with TensorRT's last message."""
    return CannotRunHere(what, got=log.last(), fix=_REBUILD)


def _refuse(engine: Engine, what: str, got: object, expected: object = None) -> NoReturn:
    raise BundleError(f"the engine {engine.directory} {what}", got=got, expected=expected, fix=_REBUILD)


def layer_and_which(name: str) -> tuple[int, str]:
    """Layer, and "key", "value" or "state", of the name of a cache input."""
    _, layer, which = name.split(".")
    assert name == past(int(layer), which)
    return int(layer), which


@cache
def engine_log(trt: Any) -> Any:
    """The logger of the process: TensorRT keeps the first one for as long as any runtime exists."""

    class Log(trt.ILogger):  # type: ignore[misc]
        """Records errors and prints nothing."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self._errors.append(message)

        def last(self) -> str | None:
            return self._errors[-1] if self._errors else None

    return Log()
