"""Build one TensorRT plan with polygraphy: parse the graph, add two profiles, configure, build.

TensorRT's API from 10.3 to 11.x and TensorRT-RTX's are distinguished by the attributes that they have, not by
version. The network is strongly typed and no precision flag is set: every layer computes in the dtype that
the graph gives.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from kvexport.bundle.engine_record import Profile
from kvexport.bundle.graph_io import LOGITS, SEQUENCE
from kvexport.devices.capabilities import capabilities_of
from kvexport.devices.versions import parse_version
from kvexport.engine.destination import Destination
from kvexport.engine.library import TensorRTLibrary
from kvexport.engine.options import EngineOptions
from kvexport.errors import CannotRunHere

_SHOWN = 3  # of TensorRT's errors in one message
# Fix for an error of TensorRT that contains these words.
_REMEDIES = {
    "workspace": "raise or leave out --workspace",
    "dedicated kernel": "build another form of the graph: --lowering decomposed17",
    "memory": "stop other programs, or lower --workspace, --chunk or --capacity",
}


@dataclass(frozen=True)
class EnginePlan:
    """A built plan.

    Attributes:
        serialized: buffer of the plan.
        layers: number of layers of the parsed network, by type.
        timing_cache: measurements for the next build; empty if the engine gives none.
    """

    serialized: Any
    layers: dict[str, int]
    timing_cache: bytes


@dataclass(frozen=True)
class PlanInspection:
    """Properties of a plan that only a loaded engine has.

    Attributes:
        layers: layers of the built engine, as TensorRT's inspector describes them (JSON).
        activation_bytes: device memory of one execution context, in bytes.
    """

    layers: Any
    activation_bytes: int


def build_plan(
    library: TensorRTLibrary,
    model: ir.Model,
    path: Path,
    profiles: Sequence[Profile],
    options: EngineOptions,
    destination: Destination,
    timing_cache: bytes,
    monitor: Any,
) -> EnginePlan:
    """Parse a graph and build its plan.

    Args:
        library: the engine.
        model: the graph, with batch and capacity fixed.
        path: the file that the graph was loaded from: TensorRT reads the external data in its folder.
        profiles: sequence lengths of the calls.
        options: options of the build.
        destination: the GPUs that will run the plan.
        timing_cache: timing cache of an earlier build; may be empty.
        monitor: a trt.IProgressMonitor.

    Raises:
        CannotRunHere: TensorRT does not import the graph, or cannot build it.
    """
    from polygraphy.backend.trt import engine_bytes_from_network
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    library.log.clear()
    builder, network, parser = parse(library, model, path)
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
            config = create_config(
                library, builder, network, profiles, options, destination, timing_cache, monitor
            )
            serialized = engine_bytes_from_network((builder, network, parser), config=config)
    except PolygraphyException as error:
        raise _build_error(library, "could not build this engine", error) from error
    measured = config.get_timing_cache() if capabilities_of(library.engine).timing_cache else None
    return EnginePlan(
        serialized, count_layers(network), b"" if measured is None else bytes(measured.serialize())
    )


def parse(library: TensorRTLibrary, model: ir.Model, path: Path) -> tuple[Any, Any, Any]:
    """Parse a graph; the weights stay in their file until TensorRT reads them.

    Returns:
        TensorRT's builder, network and parser.

    Raises:
        CannotRunHere: the parser does not import the graph.
    """
    trt = library.trt
    builder = trt.Builder(library.log)
    flags = trt.NetworkDefinitionCreationFlag
    network = builder.create_network(
        1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0
    )
    trt.init_libnvinfer_plugins(library.log, "")
    parser = trt.OnnxParser(network, library.log)
    if not parser.parse(ir.to_proto(model).SerializeToString(), str(path)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        library.log.errors[:0] = [
            f"{error.node_name() or 'the graph'} ({error.node_operator()}): {error.desc()}"
            for error in errors
        ]
        raise _build_error(library, "could not import the graph")
    return builder, network, parser


def count_layers(network: Any) -> dict[str, int]:
    """Number of layers of a network by TensorRT's name of their type, such as KV_CACHE_UPDATE."""
    names = (str(network.get_layer(index).type).rpartition(".")[2] for index in range(network.num_layers))
    return dict(sorted(Counter(names).items()))


def inspect_plan(library: TensorRTLibrary, serialized: Any) -> PlanInspection | None:
    """Load a plan on this machine's GPU and inspect it; None if it does not load."""
    trt = library.trt
    runtime = trt.Runtime(library.log)
    if hasattr(runtime, "engine_host_code_allowed"):
        runtime.engine_host_code_allowed = (
            True  # version-compatible plans contain host code; this one was built here
        )
    engine = runtime.deserialize_cuda_engine(serialized)
    if engine is None:
        return None
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    size = (
        engine.device_memory_size_v2
        if hasattr(engine, "device_memory_size_v2")
        else engine.device_memory_size
    )
    return PlanInspection(json.loads(text), int(size))


def create_config(
    library: TensorRTLibrary,
    builder: Any,
    network: Any,
    profiles: Sequence[Profile],
    options: EngineOptions,
    destination: Destination,
    timing_cache: bytes,
    monitor: Any,
) -> Any:
    """TensorRT's builder configuration of a build."""
    from polygraphy.backend.trt import CreateConfig

    trt = library.trt
    common: dict[str, Any] = {
        "profiles": [create_profile(network, profile) for profile in profiles],
        "progress_monitor": monitor,
        "strip_plan": options.refit,
        "builder_optimization_level": options.optimization_level,
        "max_aux_streams": 0 if destination.jetson else None,
    }
    if options.workspace is not None:
        common["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: options.workspace << 20}
    if library.engine == "tensorrt-rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        pairs = [parse_version(capability) for capability in destination.compute_capabilities]
        config = CreateConfigRTX(compute_capabilities=pairs, **common)(builder, network)
    else:
        level = trt.HardwareCompatibilityLevel.AMPERE_PLUS if options.hardware_compatible else None
        config = CreateConfig(
            version_compatible=options.version_compatible,
            hardware_compatibility_level=level,
            **common,
        )(builder, network)
        if timing_cache:
            config.set_timing_cache(config.create_timing_cache(timing_cache), ignore_mismatch=False)
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 of the graph must stay float32
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        # TensorRT-RTX: otherwise a step may allocate memory, and cannot be captured in a CUDA graph.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if options.refit:
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)  # only with the same weights, which costs no speed
    return config


def create_profile(network: Any, profile: Profile) -> Any:
    """Shapes of inputs with open sizes: tokens of a call, and tokens with logits (1 to as many)."""
    from polygraphy.backend.trt import Profile as Shapes

    shapes, (least, typical, most) = Shapes(), profile.sequence
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if -1 not in tuple(tensor.shape):
            continue
        names = [tensor.get_dimension_name(axis) for axis in range(len(tensor.shape))]
        ranges = {SEQUENCE: (least, typical, most), LOGITS: (1, 1, most)}
        sizes = [
            ranges[name] if size == -1 else (size,) * 3
            for name, size in zip(names, tuple(tensor.shape), strict=True)
        ]
        shapes.add(tensor.name, *(tuple(size[which] for size in sizes) for which in range(3)))
    return shapes


def _build_error(library: TensorRTLibrary, what: str, error: Exception | None = None) -> CannotRunHere:
    messages = list(dict.fromkeys(library.log.errors)) or [str(error)]
    text = " ".join(messages).lower()
    fix = next(
        (remedy for words, remedy in _REMEDIES.items() if words in text),
        "`kvexport lint` shows what this version lacks",
    )
    return CannotRunHere(f"{library} {what}", got="\n           ".join(messages[:_SHOWN]), fix=fix)
