"""Build a bundle's engine: preflight, lower, parse, build; write plan and record completely or not at all."""

from __future__ import annotations

import hashlib
import json
import resource
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir

from kvexport.bundle import DATA_FILE, GRAPH_FILE, Bundle
from kvexport.bundle.engine_record import (
    CACHE_FILE,
    INSPECTOR_FILE,
    PLAN_FILE,
    RECORD_FILE,
    BuildRecord,
    PlanFile,
    Profile,
    engine_directory,
    read_record,
    write_record,
)
from kvexport.devices.gpu import find_gpu
from kvexport.devices.system import available_memory, board
from kvexport.engine import preflight
from kvexport.engine.destination import choose_destination
from kvexport.engine.engine_graph import EngineGraph, prepare_graph
from kvexport.engine.library import TensorRTLibrary, installed_engines, load_library
from kvexport.engine.monitor import BuildMonitor
from kvexport.engine.options import EngineOptions
from kvexport.engine.plan import EnginePlan, build_plan, inspect_plan
from kvexport.errors import BundleError, UsageError
from kvexport.files.atomic_directory import atomic_directory
from kvexport.graph.lint import Parser, find_unfused_attention
from kvexport.progress import Progress
from kvexport.version import __version__

# Largest number of tokens of a call in the decode profile, which is optimised for one token. With a maximum
# of one, the engine would hold a second layout of every matrix: TensorRT-RTX 1.7.1 made 745 MiB of 417 MiB of
# weights, and makes 422 MiB with a maximum of two.
_MAX_DECODE_TOKENS = 2


def build_engine(
    path: Path,
    options: EngineOptions | None = None,
    *,
    target: str | None = None,
    compute_capabilities: Sequence[str] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> BuildRecord:
    """Build the engine of the bundle at `path` into its folder engines/<target>.

    Args:
        path: the bundle; only its folder `engines` is written to.
        options: options of the build.
        target: name of a shipped target, or path of a TOML file; None: this machine.
        compute_capabilities: compute capabilities of the GPUs that TensorRT-RTX builds for ahead of time,
            such as "8.6"; empty: the target's.
        force: replace an existing engine.
        progress: receives TensorRT's build phases and notes.

    Returns:
        the record of the build, which is also in build.json.

    Raises:
        BundleError: the bundle is damaged.
        UsageError: an option is invalid, the engine exists, or the parser does not take the graph.
        CannotRunHere: this machine lacks the engine, the GPU, memory or disk space, or TensorRT fails.
        KeyboardInterrupt: the build was interrupted; nothing is left behind.
    """
    options, progress = options or EngineOptions(), progress or Progress()
    bundle = Bundle.open(path)
    capacity, chunk = preflight.require_options(options, bundle)
    gpu = find_gpu()
    destination = choose_destination(
        target, compute_capabilities, gpu=gpu, board=board() or "", installed=installed_engines()
    )
    directory = engine_directory(path, destination.name)
    if directory.exists() and not (directory / RECORD_FILE).is_file():
        raise UsageError(
            f"{directory} must be an engine, or not exist",
            got=f"a folder without {RECORD_FILE}",
            fix=f"rm -r {directory}",
        )
    if directory.exists() and not force:
        raise UsageError(f"the engine {directory} must not exist yet", fix="replace it with --force")
    library = load_library(destination.engine)
    preflight.require_engine(options, destination, library)
    preflight.require_room(bundle, options, destination, gpu)
    bundle.verify((GRAPH_FILE, DATA_FILE))
    parser = Parser(library.engine, library.version)
    budget = None if bundle.eviction is None else min(bundle.eviction.budget, capacity)
    graph = prepare_graph(
        path / GRAPH_FILE,
        parser,
        batch=options.batch,
        capacity=capacity,
        chunk=chunk,
        budget=budget,
        lowering=options.lowering,
    )
    preflight.require_operators(graph, library)
    decomposed = _allow_decomposition(graph, parser)
    _note_differences(graph, decomposed, progress)

    with _engine_folder(directory, force) as folder:
        monitor = BuildMonitor(library.trt, progress)
        profiles = (
            Profile("decode", (1, 1, min(_MAX_DECODE_TOKENS, chunk))),
            Profile("prefill", (1, chunk, chunk)),
        )
        cache = read_timing_cache(directory, library)
        begin = time.monotonic()
        plan: EnginePlan = monitor.run(
            lambda: build_plan(
                library,
                graph.model,
                path / GRAPH_FILE,
                profiles,
                options,
                destination,
                cache,
                monitor.monitor,
            )
        )
        seconds = time.monotonic() - begin
        for warning in dict.fromkeys(library.log.warnings):
            progress.note(warning)
        size = _write(folder / PLAN_FILE, plan.serialized)
        if plan.timing_cache:
            (folder / CACHE_FILE).write_bytes(plan.timing_cache)
        loads = gpu is not None and not destination.ahead_of_time and available_memory() > 2 * size.bytes
        inspected = inspect_plan(library, plan.serialized) if loads else None
        if inspected is not None:
            (folder / INSPECTOR_FILE).write_text(
                json.dumps(inspected.layers, indent=1) + "\n", encoding="utf-8"
            )
        record = BuildRecord(
            kvexport=__version__,
            manifest_sha256=bundle.digest,
            target=destination.name,
            engine=library.engine,
            version=str(library.trt.__version__),
            lowering=graph.lowering,
            compute_capability=destination.compute_capabilities,
            dtype=bundle.dtype,
            batch=options.batch,
            capacity=capacity,
            chunk=chunk,
            profiles=profiles,
            decomposed=decomposed,
            options=options.to_record(),
            plan=size,
            layers=plan.layers,
            weights_bytes=preflight.weights_bytes(bundle),
            activation_bytes=None if inspected is None else inspected.activation_bytes,
            timing_cache_bytes=len(plan.timing_cache),
            peak_host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            seconds=seconds,
        )
        write_record(folder, record)
    return record


def _allow_decomposition(graph: EngineGraph, parser: Parser) -> tuple[str, ...]:
    """Allow TensorRT to decompose the attention that has no fused kernel.

    All other attention is left without the attribute: then it builds only if TensorRT has a fused kernel. The
    attribute is not standard ONNX, and stays in memory.

    Returns:
        names of the nodes.
    """
    nodes = find_unfused_attention(graph.model, parser)
    for node in nodes:
        node.attributes["TRT_decomposable"] = ir.AttrInt64("TRT_decomposable", 1)
    return tuple(str(node.name) for node in nodes)


def _note_differences(graph: EngineGraph, decomposed: tuple[str, ...], progress: Progress) -> None:
    for name, findings in graph.rejected.items():
        problems = Counter(finding.problem for finding in findings)
        reasons = "; ".join(f"{problem} ({count} nodes)" for problem, count in problems.most_common(3))
        progress.note(f"the graph is lowered to {graph.lowering}; {name} is not supported: {reasons}")
    if decomposed:
        notes = dict.fromkeys(finding.problem for finding in graph.findings if finding.note)
        progress.note(f"{len(decomposed)} attention nodes run without a fused kernel: {'; '.join(notes)}")


@contextmanager
def _engine_folder(directory: Path, force: bool) -> Iterator[Path]:
    """The engine's folder, written completely or not at all; an empty folder `engines` is removed."""
    parent = directory.parent
    created = not parent.exists()
    parent.mkdir(exist_ok=True)
    try:
        with atomic_directory(directory, marker=RECORD_FILE, force=force) as folder:
            yield folder
    except BaseException:
        if created and not any(parent.iterdir()):
            parent.rmdir()
        raise


def read_timing_cache(directory: Path, library: TensorRTLibrary) -> bytes:
    """The timing cache of an earlier build by the same version; empty if there is none."""
    file = directory / CACHE_FILE
    try:
        return (
            file.read_bytes()
            if file.is_file() and read_record(directory).version == library.trt.__version__
            else b""
        )
    except BundleError:
        return b""


def _write(path: Path, serialized: Any) -> PlanFile:
    """Write the plan; its hash and size."""
    view = memoryview(serialized)
    path.write_bytes(view)
    return PlanFile(hashlib.sha256(view).hexdigest(), view.nbytes)
