"""Copies of a bundle's graph that exist in memory only, for validation; the bundle itself is never changed.

Knows names of taps and how ONNX Runtime finds weights; must not know what is compared with what.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from kvexport.bundle.graph_io import attention_tap, residual_tap

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class GraphCopy:
    """A serialised graph, the folder of its external data, and the arrays that stand in for some of that data."""

    model: bytes
    folder: Path
    weights: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def session(self, options: onnxruntime.SessionOptions | None = None) -> onnxruntime.InferenceSession:
        """An ONNX Runtime session on the CPU; what the copy needs is added to the caller's `options`."""
        import onnxruntime

        options = options or onnxruntime.SessionOptions()
        options.add_session_config_entry(_DATA_FOLDER, str(self.folder.resolve()))
        if self.weights:
            values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in self.weights.values()]
            options.add_external_initializers(list(self.weights), values)
        session = onnxruntime.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])
        session.kvexport_weights = self.weights  # it reads these arrays, but would not keep them alive
        return session


def with_taps(path: Path) -> GraphCopy:
    """The graph at `path`, with each layer's attention output and residual stream as further outputs, layer by layer."""
    model = ir.load(path)
    _add_taps(model.graph)
    return GraphCopy(serialize(model), path.parent)


def as_float32(path: Path, *, taps: bool = False) -> GraphCopy:
    """The graph at `path` in float32 arithmetic on the same rounded weights; a float32 graph is as it was.

    For machines whose ONNX Runtime has no kernels of its dtype. Caches and taps become float32, too; narrower
    weights are read into memory, where they take twice their size on disk.
    """
    model = ir.load(path)
    if taps:
        _add_taps(model.graph)
    weights = widen(model.graph)
    return GraphCopy(serialize(model), path.parent, weights)


def widen(graph: ir.Graph) -> dict[str, NDArray[np.float32]]:
    """Make a graph compute in float32, in place; returns the arrays that stand in for its narrower weights."""
    weights: dict[str, NDArray[np.float32]] = {}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype not in _NARROW:
            continue
        wide = tensor.numpy().astype(np.float32)
        value.dtype = ir.DataType.FLOAT
        if isinstance(tensor, ir.ExternalTensor):
            weights[name] = wide
            tensor.release()  # unmaps the file
            value.const_value = _stand_in(tensor)
        else:
            value.const_value = ir.Tensor(wide, name=name)
    for node in graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() in _NARROW:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    for value in values:
        if value.dtype in _NARROW:
            value.dtype = ir.DataType.FLOAT
    return weights


def _add_taps(graph: ir.Graph) -> None:
    values = {output.name: output for node in graph for output in node.outputs}
    layer = 0
    while residual_tap(layer) in values:
        graph.outputs.extend((values[attention_tap(layer)], values[residual_tap(layer)]))
        layer += 1


def _stand_in(tensor: ir.ExternalTensor) -> ir.ExternalTensor:
    """The same tensor declared float32; its data is never read, since the session is given an array for it."""
    return ir.ExternalTensor(
        tensor.location, 0, 4 * tensor.size, ir.DataType.FLOAT, shape=tensor.shape, name=tensor.name or ""
    )


def serialize(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)
