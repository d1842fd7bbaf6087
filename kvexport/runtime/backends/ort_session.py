"""ONNX Runtime sessions.

Options, and loading a bundle's graph, whose inputs and outputs must match the manifest.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Any

import onnxruntime

from kvexport.bundle import GRAPH_FILE, Bundle
from kvexport.bundle.graph_io import LOWERED_FILES
from kvexport.errors import BundleError, CannotRunHere, UsageError
from kvexport.packages import install_command

CUDA = "CUDAExecutionProvider"
ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"  # of the MatMulNBits that ONNX Runtime makes
EXACT, INT8_ACTIVATIONS = "1", "4"
MAX_THREADS = 1024  # ONNX Runtime starts as many threads as requested, and blocks until all are running

_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
}
# kSameAsRequested: otherwise the arena grows to the next power of two, and takes memory that the cache needs.
_PROVIDERS: dict[str, list[Any]] = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": [(CUDA, {"device_id": 0, "arena_extend_strategy": "kSameAsRequested"})],
}


def graph_file(bundle: Bundle, provider: str) -> str:
    """Name of the graph that ONNX Runtime runs on "cpu" or "cuda".

    The one lowered for it, if the bundle has it.
    """
    lowered = LOWERED_FILES[provider]
    return lowered if lowered in bundle.files else GRAPH_FILE


def load_graph(
    bundle: Bundle, options: onnxruntime.SessionOptions, provider: str = "cpu"
) -> onnxruntime.InferenceSession:
    """Load the bundle's graph for "cpu" or "cuda".

    Raises:
        CannotRunHere: this ONNX Runtime cannot run it.
        BundleError: its inputs or outputs contradict the manifest.
    """
    if bundle.dtype == "bfloat16" and provider == "cpu":
        raise CannotRunHere(
            "the dtype must be float32 or float16 for ONNX Runtime on the CPU, which has no bfloat16 kernels",
            got=f"{bundle.path}, dtype bfloat16",
            fix=(
                "build it with --dtype float32 or float16; `kvexport validate` still works here: "
                "it computes in float32"
            ),
        )
    try:
        session = session_on(provider, str(bundle.path / graph_file(bundle, provider)), options)
    except CannotRunHere:
        raise
    except Exception as error:  # ONNX Runtime's exceptions have no other base
        raise CannotRunHere(
            f"ONNX Runtime {onnxruntime.__version__} cannot load the graph of the bundle {bundle.path}",
            got=str(error).splitlines()[0],
            expected="onnxruntime 1.28 or later, and an undamaged bundle",
            fix=(
                "pip install --upgrade onnxruntime; "
                f"check the bundle with: kvexport inspect --verify {bundle.path}"
            ),
        ) from error
    _require_contract(session, bundle)
    return session


def session_on(
    provider: str, model: str | bytes, options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    """A session on "cpu" or "cuda".

    With "cuda", a fallback to the CPU, of which ONNX Runtime only warns, is an error.

    Raises:
        CannotRunHere: CUDA could not be started.
    """
    if provider == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        with redirect_stdout(sys.stderr):  # it prints the libraries that are missing
            onnxruntime.preload_dlls()  # CUDA's libraries from wheels
    session = onnxruntime.InferenceSession(model, options, providers=_PROVIDERS[provider])
    if provider == "cuda" and CUDA not in session.get_providers():
        raise CannotRunHere(
            "ONNX Runtime could not start on the GPU",
            got=f"{', '.join(session.get_providers())} only",
            fix=f"{install_command('onnxruntime-gpu')}; the warning above names what failed to load",
        )
    return session


def session_options(threads: int | None, *, exact: bool = False) -> onnxruntime.SessionOptions:
    """Options of every session.

    With integer weights, ONNX Runtime's CPU rounds activations to int8 in each linear map, a block at a time.

    Subnormal numbers are kept, although a few weights of attention can be subnormal and slow a processor:
    ONNX Runtime's option to flush them changes the whole calling thread, permanently.

    All other options are ONNX Runtime's defaults, after measurements with a llama of 109 M parameters and a
    prompt of 2048 tokens. Weights are mapped and then packed, which frees the mapped pages; without packing,
    prefill takes a quarter more processor time, and decoding no less. Without the memory arena, up to 90 MB
    more stay resident after a prefill; memory patterns make no difference.

    Args:
        threads: per operator; None: one per core.
        exact: compute linear maps with integer weights in the dtype of the graph instead.

    Raises:
        UsageError: `threads` is out of range.
    """
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"threads must be from 1 to {MAX_THREADS}", got=threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.add_session_config_entry(ACCURACY_LEVEL, EXACT if exact else INT8_ACTIVATIONS)
    return options


def _require_contract(session: onnxruntime.InferenceSession, bundle: Bundle) -> None:
    """
    Raises:
        BundleError: inputs or outputs of the graph contradict the manifest.
    """
    for kind, values, specs in (
        ("input", session.get_inputs(), bundle.graph.inputs),
        ("output", session.get_outputs(), bundle.graph.outputs),
    ):
        actual = [(value.name, _TYPES.get(value.type, value.type), tuple(value.shape)) for value in values]
        expected = [(spec.name, spec.dtype, spec.shape) for spec in specs]
        if len(actual) != len(expected):
            raise BundleError(
                f"the bundle's graph must have the {kind}s of its manifest",
                got=f"{len(actual)} {kind}s",
                expected=f"{len(expected)} {kind}s",
            )
        for one, other in zip(actual, expected, strict=True):
            if one != other:
                raise BundleError(
                    f"every {kind} of the bundle's graph must match its manifest", got=one, expected=other
                )
