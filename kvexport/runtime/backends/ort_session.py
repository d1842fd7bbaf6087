"""A bundle's graph, loaded by ONNX Runtime and held against the manifest; knows nothing of how it is called."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Any

import onnxruntime

from kvexport.bundle.bundle import GRAPH_FILE, Bundle
from kvexport.bundle.graph_io import LOWERED_FILES
from kvexport.errors import BundleError, CannotRunHere, UsageError
from kvexport.packages import install_command

CUDA = "CUDAExecutionProvider"
MOST_THREADS = 1024  # ONNX Runtime starts as many as it is told, and does nothing else until they are there

_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
}
# kSameAsRequested: the arena would else grow to the next power of two, and take memory that the cache needs.
_PROVIDERS: dict[str, list[Any]] = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": [(CUDA, {"device_id": 0, "arena_extend_strategy": "kSameAsRequested"})],
}


def graph_file(bundle: Bundle, kind: str) -> str:
    """The graph of a bundle that ONNX Runtime runs on "cpu" or "cuda": the one that was lowered for it, if there is one."""
    lowered = LOWERED_FILES[kind]
    return lowered if lowered in bundle.files else GRAPH_FILE


def load_graph(
    bundle: Bundle, options: onnxruntime.SessionOptions, kind: str = "cpu"
) -> onnxruntime.InferenceSession:
    """The bundle's graph for `kind`, "cpu" or "cuda".

    Raises:
        CannotRunHere: this ONNX Runtime cannot run it.
        BundleError: it takes or gives other tensors than the manifest says.
    """
    if bundle.dtype == "bfloat16" and kind == "cpu":
        raise CannotRunHere(
            "ONNX Runtime has no bfloat16 kernels for the CPU",
            got=f"{bundle.path}, dtype bfloat16",
            fix="build it with --dtype float32 or float16; `kvexport validate` proves it here all the same, in float32",
        )
    try:
        session = session_on(kind, str(bundle.path / graph_file(bundle, kind)), options)
    except CannotRunHere:
        raise
    except Exception as error:  # ONNX Runtime's own exceptions have no other base
        raise CannotRunHere(
            f"ONNX Runtime {onnxruntime.__version__} cannot load the graph of the bundle {bundle.path}",
            got=str(error).splitlines()[0],
            expected="onnxruntime 1.28 or later, and a sound bundle",
            fix=f"pip install --upgrade onnxruntime; check the bundle with: kvexport inspect --verify {bundle.path}",
        ) from error
    _require_contract(session, bundle)
    return session


def session_on(
    kind: str, model: str | bytes, options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    """A session on the CPU or on CUDA, where it would else fall back to the CPU and say so in a warning only.

    Raises:
        CannotRunHere: CUDA was asked for and did not come up.
    """
    if kind == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        with redirect_stdout(sys.stderr):  # where it prints what it does not find
            onnxruntime.preload_dlls()  # CUDA's libraries, where they were installed from wheels
    session = onnxruntime.InferenceSession(model, options, providers=_PROVIDERS[kind])
    if kind == "cuda" and CUDA not in session.get_providers():
        raise CannotRunHere(
            "ONNX Runtime could not start on the GPU",
            got=f"{', '.join(session.get_providers())} alone",
            fix=f"{install_command('onnxruntime-gpu')}; what failed to load is in the warning above",
        )
    return session


def session_options(threads: int | None) -> onnxruntime.SessionOptions:
    """Options of every session: `threads` for one operator (None: one a core).

    Numbers too small to be normal are kept, although weights of slots that hardly matter can be such and take
    a processor tens of times as long: ONNX Runtime's option to flush them flushes those of the whole calling
        thread, and for good.

    All else is left as ONNX Runtime has it, after measuring a llama of 109 M parameters and a prompt of 2048
    tokens: weights are mapped and then packed once, which frees the mapped pages (without packing prefill
        takes a quarter more
    processor time, and decoding no less); without the memory arena up to 90 MB more stay resident after a
    prefill, and without memory patterns as much as with them.

    Raises:
        UsageError: threads is below 1, or beyond any machine's.
    """
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise UsageError("threads is out of range", got=threads, expected=f"1 to {MOST_THREADS}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    return options


def _require_contract(session: onnxruntime.InferenceSession, bundle: Bundle) -> None:
    for kind, found, promised in (
        ("input", session.get_inputs(), bundle.graph.inputs),
        ("output", session.get_outputs(), bundle.graph.outputs),
    ):
        seen = [(value.name, _TYPES.get(value.type, value.type), tuple(value.shape)) for value in found]
        allowed = [(spec.name, spec.dtype, spec.shape) for spec in promised]
        if len(seen) != len(allowed):
            raise BundleError(
                f"the bundle's graph has another number of {kind}s", got=len(seen), expected=len(allowed)
            )
        for one, other in zip(seen, allowed, strict=True):
            if one != other:
                raise BundleError(
                    f"an {kind} of the bundle's graph is not what its manifest says", got=one, expected=other
                )
