"""Copies of a bundle's graph in memory, for validation; the bundle itself is never changed."""

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
    """A copy of a graph.

    Attributes:
        model: the serialised ONNX model.
        folder: where its external data is.
        weights: float32 arrays that replace external tensors, by name.
    """

    model: bytes
    folder: Path
    weights: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def session(self, options: onnxruntime.SessionOptions | None = None) -> onnxruntime.InferenceSession:
        """Open an ONNX Runtime session on the CPU; the options that the copy needs are added to `options`."""
        import onnxruntime

        options = options or onnxruntime.SessionOptions()
        options.add_session_config_entry(_DATA_FOLDER, str(self.folder.resolve()))
        if self.weights:
            values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in self.weights.values()]
            options.add_external_initializers(list(self.weights), values)
        session = onnxruntime.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])
        session.kvexport_weights = self.weights  # the session reads these arrays, but holds no reference
        return session


def with_taps(path: Path, *, accuracy_level: int | None = None) -> GraphCopy:
    """Copy the graph at `path`; each layer's attention output and residual stream become outputs.

    Args:
        accuracy_level: of the graph's MatMulNBits: 1 computes in float32, 4 rounds activations to int8; None:
            that of the file.
    """
    model = ir.load(path)
    _add_taps(model.graph)
    for node in model.graph:
        if node.op_type == "MatMulNBits" and accuracy_level is not None:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", accuracy_level)
    return GraphCopy(serialize(model), path.parent)


def as_float32(path: Path, *, taps: bool = False) -> GraphCopy:
    """Copy the graph at `path`, computing in float32 with the same rounded weights.

    A float32 graph is copied unchanged. For machines whose ONNX Runtime has no kernels for the graph's dtype.
    Caches and taps become float32, too. Float16 and bfloat16 weights are read into memory, where they take
    twice their size on disk.

    Args:
        taps: add the outputs that `with_taps` adds.
    """
    model = ir.load(path)
    if taps:
        _add_taps(model.graph)
    weights = widen(model.graph)
    return GraphCopy(serialize(model), path.parent, weights)


def widen(graph: ir.Graph) -> dict[str, NDArray[np.float32]]:
    """Make a graph compute in float32, in place.

    Returns:
        float32 arrays that replace the graph's external float16 and bfloat16 weights, by name.
    """
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
            value.const_value = _declared_float32(tensor)
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


def _declared_float32(tensor: ir.ExternalTensor) -> ir.ExternalTensor:
    """The same tensor declared as float32. Its data is never read: the session gets an array for it."""
    return ir.ExternalTensor(
        tensor.location, 0, 4 * tensor.size, ir.DataType.FLOAT, shape=tensor.shape, name=tensor.name or ""
    )


def serialize(model: ir.Model) -> bytes:
    """The bytes of a model; equal models give equal bytes."""
    return ir.to_proto(model).SerializeToString(deterministic=True)
