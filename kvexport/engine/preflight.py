"""Whether a build can succeed here, asked before anything is built: options, GPU, memory, disk, operators.

Knows what a build needs; must not know how it is done. Each refusal names the number and the remedy.
"""

from __future__ import annotations

import shutil

from kvexport.bundle.bundle import DATA_FILE, Bundle
from kvexport.devices.capabilities import TENSORRT_LOWERINGS
from kvexport.devices.gpu import Gpu
from kvexport.devices.system import available_memory
from kvexport.engine.destination import Destination
from kvexport.engine.engine_graph import EngineGraph
from kvexport.engine.library import TensorRTLibrary
from kvexport.engine.options import CHUNK, EngineOptions
from kvexport.errors import CannotRunHere, UsageError
from kvexport.graph.lint import Finding, refusals

# What a build holds at its peak, in multiples of the weights and beside them. TensorRT-RTX 1.7.1 was measured: 1.69 GB for
# 402 MB of weights. TensorRT is said to need 2 to 3 times.
_COPIES = 2
_LIBRARIES = {"tensorrt": 512 * 2**20, "tensorrt-rtx": 2**30}
_IN_PLAN = 1  # times that a plan holds the weights
_KERNELS = 64 * 2**20  # of a plan, beside its weights
_MIB = 2**20
_SHOWN = 5  # findings in one message


def require_options(options: EngineOptions, bundle: Bundle) -> tuple[int, int]:
    """The capacity and the chunk of the engine.

    Raises:
        UsageError: an option is out of range.
    """
    capacity = bundle.capacity if options.capacity is None else options.capacity
    if not 1 <= capacity <= bundle.capacity:
        raise UsageError(
            "the capacity is not one that the bundle has",
            got=capacity,
            expected=f"1 to {bundle.capacity}",
            fix="leave out --capacity, or build the bundle again with a larger one",
        )
    eviction = bundle.eviction
    if eviction is not None and capacity <= eviction.protected:
        raise UsageError(
            "the capacity leaves no token that may go",
            got=capacity,
            expected=f"{eviction.protected + 1} to {bundle.capacity}: {eviction.protected} are protected",
            fix="leave out --capacity, or raise it",
        )
    # A runtime reads no more of a prompt at once than layers that evict have room made for.
    most = capacity if eviction is None else min(capacity, eviction.chunk)
    chunk = min(CHUNK, most) if options.chunk is None else options.chunk
    if not 1 <= chunk <= most:
        what = (
            "the chunk does not fit the capacity"
            if most == capacity
            else "the chunk does not fit the bundle's --kv-budget"
        )
        raise UsageError(what, got=chunk, expected=f"1 to {most}")
    if options.batch < 1:
        raise UsageError("the batch is empty", got=options.batch, expected="1 sequence or more")
    if options.workspace is not None and options.workspace < 1:
        raise UsageError(
            "the workspace is out of range", got=f"{options.workspace} MiB", expected="1 MiB or more"
        )
    if options.optimization_level is not None and not 0 <= options.optimization_level <= 5:
        raise UsageError("no such optimisation level", got=options.optimization_level, expected="0 to 5")
    if options.lowering is not None and options.lowering not in TENSORRT_LOWERINGS:
        raise UsageError(
            "no lowering for TensorRT", got=options.lowering, expected=", ".join(TENSORRT_LOWERINGS)
        )
    return capacity, chunk


def require_engine(options: EngineOptions, destination: Destination, library: TensorRTLibrary) -> None:
    """The installed engine builds for that GPU, and has what the options ask for.

    Raises:
        UsageError, CannotRunHere: it does not.
    """
    if library.engine == "tensorrt-rtx":
        known = library.compute_capabilities
        for capability in destination.compute_capabilities:
            if capability not in known:
                raise UsageError(
                    f"{library} does not build for this GPU",
                    got=f"compute capability {capability}",
                    expected=", ".join(known),
                    fix="on a Jetson or a data centre GPU install the full TensorRT, and build there",
                )
        for asked, what in (
            (options.version_compatible, "version"),
            (options.hardware_compatible, "hardware"),
        ):
            if asked:
                fix = f"leave out --{what}-compatible; several --compute-capability make one plan for several GPUs"
                raise UsageError(
                    f"{library} has no {what}-compatible plans", expected="TensorRT 10.3 or later", fix=fix
                )
        if options.refit and destination.ahead:
            raise CannotRunHere(
                f"{library} builds plans without weights on the GPU only",
                fix="leave out --refit, or build there",
            )
    elif options.hardware_compatible and destination.jetson:
        raise UsageError(
            "TensorRT has hardware-compatible plans for desktop GPUs only",
            got=f"compute capability {', '.join(destination.compute_capabilities)}",
            fix="leave out --hardware-compatible",
        )


def require_room(bundle: Bundle, options: EngineOptions, destination: Destination, gpu: Gpu | None) -> None:
    """Memory for the build and disk for the plan.

    Raises:
        CannotRunHere: there is too little.
    """
    weights = weights_bytes(bundle)
    needed, free = _COPIES * weights + _LIBRARIES[destination.engine], available_memory()
    if free < needed:
        raise CannotRunHere(
            "too little memory is free to build this engine",
            got=f"{free / _MIB:.0f} MiB free",
            expected=f"{needed / _MIB:.0f} MiB: {_COPIES} times the weights ({weights / _MIB:.0f} MiB), and TensorRT itself",
            fix="stop other programs (a desktop: sudo init 3), add swap, or build on a machine of the same GPU with more memory",
        )
    if gpu is not None and not destination.ahead and not gpu.unified and gpu.memory < weights:
        raise CannotRunHere(
            f"the weights do not fit {gpu.name}",
            got=f"{weights / _MIB:.0f} MiB of weights",
            expected=f"{gpu.memory / _MIB:.0f} MiB in all",
            fix="choose a smaller model or a GPU with more memory; `kvexport plan` says what fits",
        )
    can_refit = not options.refit and not (destination.ahead and destination.engine == "tensorrt-rtx")
    needed, free = (
        (0 if options.refit else _IN_PLAN * weights) + _KERNELS,
        shutil.disk_usage(bundle.path).free,
    )
    if free < needed:
        raise CannotRunHere(
            f"too little disk is free for the plan in {bundle.path}",
            got=f"{free / _MIB:.0f} MiB free",
            expected=f"{needed / _MIB:.0f} MiB",
            fix="free space, or leave the weights out of the plan with --refit"
            if can_refit
            else "free space",
        )


def require_operators(fitted: EngineGraph, library: TensorRTLibrary) -> None:
    """The parser imports every operator as it stands.

    Raises:
        UsageError: names what it does not.
    """
    refused = refusals(fitted.findings)
    if refused:
        raise UsageError(
            f"{library} does not take the graph lowered to {fitted.lowering}",
            got=sentences(refused),
            fix="leave out --lowering"
            if fitted.lowering != TENSORRT_LOWERINGS[-1]
            else "`kvexport lint` shows all of it",
        )


def sentences(findings: list[Finding]) -> str:
    """The first few findings, each on a line."""
    said = [f"{finding.node} ({finding.operator}): {finding.problem}" for finding in findings[:_SHOWN]]
    more = [f"and {len(findings) - _SHOWN} more"] if len(findings) > _SHOWN else []
    return "\n           ".join([*said, *more])


def weights_bytes(bundle: Bundle) -> int:
    return bundle.files[DATA_FILE].bytes
