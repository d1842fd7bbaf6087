"""Write a neutral decoder as one ONNX graph: opset 24, standard operators of the default domain only.

`DecoderWriter` writes the graph, `GraphContract` describes its inputs and outputs, `lower` rewrites it for an
engine, `render` prints it, and `with_taps` and `as_float32` copy it in memory for validation. The onnx
packages are imported when a name that needs them is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvexport.bundle.graph_io import (
    DATA_FILE,
    GRAPH_FILE,
    LOWERED_FILES,
    GraphContract,
    TensorSpec,
    attention_tap,
    past,
    present,
    residual_tap,
    update,
)

if TYPE_CHECKING:
    from kvexport.graph.keep_float32 import Float32Exceptions
    from kvexport.graph.lowering import LOWERINGS, lower, lowered_contract, write_lowered
    from kvexport.graph.printer import render
    from kvexport.graph.taps import GraphCopy, as_float32, with_taps
    from kvexport.graph.writer import DecoderWriter

__all__ = [
    "DATA_FILE",
    "GRAPH_FILE",
    "LOWERED_FILES",
    "LOWERINGS",
    "DecoderWriter",
    "Float32Exceptions",
    "GraphContract",
    "GraphCopy",
    "TensorSpec",
    "as_float32",
    "attention_tap",
    "lower",
    "lowered_contract",
    "past",
    "present",
    "render",
    "residual_tap",
    "update",
    "with_taps",
    "write_lowered",
]

_LAZY = {
    "DecoderWriter": "writer",
    "GraphCopy": "taps",
    "as_float32": "taps",
    "with_taps": "taps",
    "render": "printer",
    "Float32Exceptions": "keep_float32",
    "LOWERINGS": "lowering",
    "lower": "lowering",
    "lowered_contract": "lowering",
    "write_lowered": "lowering",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"kvexport.graph.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'kvexport.graph' has no attribute {name!r}")
