"""A bundle's graph, loaded by ONNX Runtime and held against the manifest; knows nothing of how it is called."""

from __future__ import annotations

import onnxruntime

from kvexport.bundle import GRAPH_FILE, Bundle
from kvexport.errors import BundleError, CannotRunHere

_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}


def load_graph(bundle: Bundle, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """The bundle's graph on the CPU.

    Raises:
        CannotRunHere: this ONNX Runtime cannot run it.
        BundleError: it takes or gives other tensors than the manifest says.
    """
    if bundle.dtype == "bfloat16":
        raise CannotRunHere(
            "ONNX Runtime has no bfloat16 kernels for the CPU", seen=f"{bundle.path}, dtype bfloat16",
            fix="build it with --dtype float32 or float16; `kvexport validate` proves it here all the same, in float32",
        )  # fmt: skip
    try:
        session = onnxruntime.InferenceSession(str(bundle.path / GRAPH_FILE), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions have no other base
        raise CannotRunHere(
            f"ONNX Runtime {onnxruntime.__version__} cannot load the graph of the bundle {bundle.path}",
            seen=str(error).splitlines()[0],
            allowed="onnxruntime 1.28 or later, and a sound bundle",
            fix=f"pip install --upgrade onnxruntime; check the bundle with: kvexport inspect --verify {bundle.path}",
        ) from error
    _require_contract(session, bundle)
    return session


def _require_contract(session: onnxruntime.InferenceSession, bundle: Bundle) -> None:
    for kind, found, promised in (
        ("input", session.get_inputs(), bundle.graph.inputs),
        ("output", session.get_outputs(), bundle.graph.outputs),
    ):
        seen = [(value.name, _TYPES.get(value.type, value.type), tuple(value.shape)) for value in found]
        allowed = [(spec.name, spec.dtype, spec.shape) for spec in promised]
        if len(seen) != len(allowed):
            raise BundleError(f"the bundle's graph has another number of {kind}s", seen=len(seen), allowed=len(allowed))
        for one, other in zip(seen, allowed, strict=True):
            if one != other:
                raise BundleError(f"an {kind} of the bundle's graph is not what its manifest says", seen=one, allowed=other)
