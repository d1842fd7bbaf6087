"""A plan becomes a TensorRT engine, with the weights that it lacks, and is held against its record before anything is bound.

Knows TensorRT's runtime and refitter (10.3 to 11.x and TensorRT-RTX); must not know how an engine is called.
"""

from __future__ import annotations

import mmap
from functools import cache
from typing import Any, NoReturn

from kvexport.bundle.bundle import GRAPH_FILE, Bundle
from kvexport.bundle.graph_io import (
    BATCH,
    BUDGET,
    CAPACITY,
    STATE,
    past,
    present,
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
    """The engine; its plan is mapped, so that it need not be in memory twice."""
    if engine.record.options.get("version_compatible") and hasattr(runtime, "engine_host_code_allowed"):
        runtime.engine_host_code_allowed = True
    with engine.plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        loaded = runtime.deserialize_cuda_engine(plan)
    if loaded is None:
        version = engine.trt.__version__
        raise CannotRunHere(f"TensorRT {version} cannot load {engine.plan}", got=log.last(), fix=_REBUILD)
    return loaded


def refit(loaded: Any, engine: Engine, bundle: Bundle, log: Any) -> None:
    """Put the bundle's weights into an engine that was built without: TensorRT's parser reads them, by their names.

    It is given the graph that the engine was built from, since a lowering has numbers of its own.

    Raises:
        CannotRunHere: TensorRT misses some.
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
    """
    Raises:
        BundleError: the engine takes or gives other tensors than its record and the bundle say.
    """
    record = engine.record
    sizes = {BATCH: record.batch, CAPACITY: record.capacity}
    if bundle.eviction is not None:
        sizes[BUDGET] = min(bundle.eviction.budget, record.capacity)

    caches = [spec for spec in bundle.graph.inputs if spec.name not in TOKEN_INPUTS]
    shapes = {spec.name: (spec.dtype, tuple(sized(each, sizes) for each in spec.shape)) for spec in caches}
    given = {(present if in_place else update)(*layer_and_which(name)): name for name in shapes}
    names = {loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors)}
    states = [] if in_place else [layer_and_which(name)[0] for name in shapes if name.endswith(STATE)]
    promised = {*TOKEN_INPUTS, "logits", *shapes, *given, *map(slots_output, states)}
    if names != promised:
        _refuse(engine, "takes or gives other tensors", sorted(names ^ promised), "those of its lowering")
    for name in names:
        if not str(loaded.get_tensor_location(name)).endswith("DEVICE"):
            _refuse(engine, "wants a tensor in the host's memory", name, "all on the device")
    for name, (dtype, shape) in shapes.items():
        seen = _TYPES.get(loaded.get_tensor_dtype(name).name), tuple(loaded.get_tensor_shape(name))
        if seen != (dtype, shape):
            _refuse(engine, f"has another {name}", seen, (dtype, shape))
    for name in (*TOKEN_INPUTS, "logits"):
        seen_type = _TYPES.get(loaded.get_tensor_dtype(name).name)
        if seen_type != ("float32" if name == "logits" else "int64"):
            _refuse(engine, f"has another type of {name}", seen_type, "float32 logits, int64 inputs")
    if in_place and hasattr(loaded, "get_aliased_input_tensor"):
        for output, cache in given.items():
            if loaded.get_aliased_input_tensor(output) != cache:
                _refuse(
                    engine,
                    "does not write the cache in place",
                    loaded.get_aliased_input_tensor(output),
                    f"{output} is {cache}",
                )


def failure(log: Any, what: str) -> CannotRunHere:
    return CannotRunHere(what, got=log.last(), fix=_REBUILD)


def _refuse(engine: Engine, what: str, got: object, expected: object) -> NoReturn:
    raise BundleError(f"the engine {engine.directory} {what}", got=got, expected=expected, fix=_REBUILD)


def layer_and_which(name: str) -> tuple[int, str]:
    """Layer and "key", "value" or "state" of a cache input's name."""
    _, layer, which = name.split(".")
    assert name == past(int(layer), which)
    return int(layer), which


@cache
def engine_log(trt: Any) -> Any:
    """One for a process: TensorRT keeps the first for as long as any runtime is alive, whoever else has let go of it."""

    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps errors; says nothing itself."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self._errors.append(message)

        def last(self) -> str | None:
            return self._errors[-1] if self._errors else None

    return Log()
