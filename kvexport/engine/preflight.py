"""Check, before a build begins, that it can succeed: options, engine, memory, disk space, operators."""

from __future__ import annotations

import shutil

from kvexport.bundle import DATA_FILE, Bundle
from kvexport.devices.capabilities import TENSORRT_LOWERINGS, capabilities_of
from kvexport.devices.gpu import Gpu
from kvexport.devices.system import available_memory
from kvexport.engine.destination import Destination
from kvexport.engine.engine_graph import EngineGraph
from kvexport.engine.library import TensorRTLibrary
from kvexport.engine.options import DEFAULT_CHUNK, EngineOptions
from kvexport.errors import CannotRunHere, UsageError
from kvexport.graph.lint import Finding, refusals

# Peak host memory of a build: multiples of the weights, and bytes besides. TensorRT-RTX 1.7.1 was measured:
# 1.69 GB for 402 MB of weights. TensorRT is reported to need 2 to 3 times the weights; not measured here.
_WEIGHT_COPIES = 2
_LIBRARY_BYTES = {"tensorrt": 512 * 2**20, "tensorrt-rtx": 2**30}
_PLAN_COPIES = 1  # copies of the weights in a plan
_KERNEL_BYTES = 64 * 2**20  # of a plan, besides its weights
_MIB = 2**20
_SHOWN = 5  # findings in one message


def require_options(options: EngineOptions, bundle: Bundle) -> tuple[int, int]:
    """Check the options, and choose capacity and chunk of the engine, in tokens.

    Raises:
        UsageError: an option is out of range.
    """
    capacity = bundle.capacity if options.capacity is None else options.capacity
    if not 1 <= capacity <= bundle.capacity:
        raise UsageError(
            "the capacity must be within the bundle's",
            got=capacity,
            expected=f"1 to {bundle.capacity}",
            fix="leave out --capacity, or build the bundle again with a larger one",
        )
    eviction = bundle.eviction
    if eviction is not None and capacity <= eviction.protected:
        raise UsageError(
            "the capacity must leave a token that can be evicted",
            got=capacity,
            expected=f"{eviction.protected + 1} to {bundle.capacity}: {eviction.protected} are protected",
            fix="leave out --capacity, or raise it",
        )
    # A call must not have more tokens than layers with eviction make room for.
    most = capacity if eviction is None else min(capacity, eviction.chunk)
    chunk = min(DEFAULT_CHUNK, most) if options.chunk is None else options.chunk
    if not 1 <= chunk <= most:
        limit = "the capacity" if most == capacity else "the bundle's --kv-budget"
        raise UsageError(f"the chunk must fit {limit}", got=chunk, expected=f"1 to {most}")
    if options.batch < 1:
        raise UsageError("the batch must have a sequence", got=options.batch, expected=">= 1 sequence")
    if options.workspace is not None and options.workspace < 1:
        raise UsageError(
            "the workspace must be positive", got=f"{options.workspace} MiB", expected=">= 1 MiB"
        )
    if options.optimization_level is not None and not 0 <= options.optimization_level <= 5:
        raise UsageError(
            "the optimisation level must be in range", got=options.optimization_level, expected="0 to 5"
        )
    if options.lowering is not None and options.lowering not in TENSORRT_LOWERINGS:
        raise UsageError(
            "the lowering must be one for TensorRT",
            got=options.lowering,
            expected=", ".join(TENSORRT_LOWERINGS),
        )
    return capacity, chunk


def require_engine(options: EngineOptions, destination: Destination, library: TensorRTLibrary) -> None:
    """The installed engine must build for the destination's GPUs, with the requested options.

    Raises:
        UsageError: the engine does not build for a GPU, or lacks an option.
        CannotRunHere: the engine has an option only on the device.
    """
    capabilities = capabilities_of(library.engine, library.version)
    if capabilities.ahead_of_time:
        known = library.compute_capabilities
        for capability in destination.compute_capabilities:
            if capability not in known:
                raise UsageError(
                    f"{library} must be able to build for the GPU",
                    got=f"compute capability {capability}",
                    expected=", ".join(known),
                    fix="on a Jetson or a data centre GPU install the full TensorRT, and build there",
                )
    for requested, what in (
        (options.version_compatible, "version"),
        (options.hardware_compatible, "hardware"),
    ):
        if requested and not capabilities.compatible_plans:
            raise UsageError(
                f"{library} does not build {what}-compatible plans",
                expected="TensorRT 10.3 or later",
                fix=f"leave out --{what}-compatible; repeat --compute-capability for a plan for several GPUs",
            )
    if options.refit and destination.ahead_of_time:
        raise CannotRunHere(
            f"{library} builds plans without weights only on the GPU that will run them",
            got=f"--refit, ahead of time for {', '.join(destination.compute_capabilities)}",
            fix="leave out --refit, or build there",
        )
    if options.hardware_compatible and destination.jetson:
        raise UsageError(
            "TensorRT builds hardware-compatible plans only for desktop GPUs",
            got=f"compute capability {', '.join(destination.compute_capabilities)}",
            fix="leave out --hardware-compatible",
        )


def build_memory(weights: int, engine: str) -> int:
    """Bytes of host memory that a build needs at its peak, for so many bytes of weights."""
    return _WEIGHT_COPIES * weights + _LIBRARY_BYTES[engine]


def require_room(bundle: Bundle, options: EngineOptions, destination: Destination, gpu: Gpu | None) -> None:
    """There must be enough memory for the build, disk space for the plan, and GPU memory for the weights.

    Raises:
        CannotRunHere: one of them is too small.
    """
    weights = weights_bytes(bundle)
    needed, free = build_memory(weights, destination.engine), available_memory()
    if free < needed:
        raise CannotRunHere(
            "not enough free memory to build this engine",
            got=f"{free / _MIB:.0f} MiB free",
            expected=f"{needed / _MIB:.0f} MiB: {_WEIGHT_COPIES} times the weights "
            f"({weights / _MIB:.0f} MiB), and TensorRT itself",
            fix="stop other programs (a desktop: sudo init 3), add swap, or build on a machine with "
            "the same GPU and more memory",
        )
    if gpu is not None and not destination.ahead_of_time and not gpu.unified and gpu.memory < weights:
        raise CannotRunHere(
            f"the weights must fit the memory of {gpu.name}",
            got=f"{weights / _MIB:.0f} MiB of weights",
            expected=f"{gpu.memory / _MIB:.0f} MiB in all",
            fix="choose a smaller model or a GPU with more memory; `kvexport plan` says what fits",
        )
    can_refit = not options.refit and not (destination.ahead_of_time)
    needed, free = (
        (0 if options.refit else _PLAN_COPIES * weights) + _KERNEL_BYTES,
        shutil.disk_usage(bundle.path).free,
    )
    if free < needed:
        raise CannotRunHere(
            f"not enough free disk space for the plan in {bundle.path}",
            got=f"{free / _MIB:.0f} MiB free",
            expected=f"{needed / _MIB:.0f} MiB",
            fix="free space, or leave the weights out of the plan with --refit"
            if can_refit
            else "free space",
        )


def require_operators(graph: EngineGraph, library: TensorRTLibrary) -> None:
    """The parser and the builder must take every node of the graph.

    Raises:
        UsageError: they do not; the message lists the first findings.
    """
    refused = refusals(graph.findings)
    if refused:
        raise UsageError(
            f"{library} does not support the graph lowered to {graph.lowering}",
            got=format_findings(refused),
            fix="leave out --lowering"
            if graph.lowering != TENSORRT_LOWERINGS[-1]
            else "`kvexport lint` shows all of it",
        )


def format_findings(findings: list[Finding]) -> str:
    """The first findings, one on each line."""
    lines = [f"{finding.node} ({finding.operator}): {finding.problem}" for finding in findings[:_SHOWN]]
    more = [f"and {len(findings) - _SHOWN} more"] if len(findings) > _SHOWN else []
    return "\n           ".join([*lines, *more])


def weights_bytes(bundle: Bundle) -> int:
    """Size of the bundle's weights, in bytes."""
    return bundle.files[DATA_FILE].bytes
