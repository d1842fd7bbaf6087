"""Parsers of TensorRT, what lint finds about them, and what rules read from a node."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kvexport.devices.capabilities import EngineCapabilities, capabilities_of
from kvexport.devices.versions import Version


@dataclass(frozen=True)
class Parser:
    """The ONNX parser of one version of an engine.

    Attributes:
        engine: "tensorrt" or "tensorrt-rtx".
        version: such as (10, 3, 0, 30).
    """

    engine: str
    version: Version

    @property
    def capabilities(self) -> EngineCapabilities:
        return capabilities_of(self.engine, self.version)

    @property
    def title(self) -> str:
        return "TensorRT-RTX" if self.engine == "tensorrt-rtx" else "TensorRT"

    def __str__(self) -> str:
        return f"{self.title} {'.'.join(map(str, self.version))}"


@dataclass(frozen=True)
class Finding:
    """One thing that a parser or builder does not take.

    Attributes:
        node: the node's name; empty if the finding is about the whole graph.
        operator: the node's operator, with its domain unless it is the default one.
        problem: what is not taken.
        remedy: what to do.
        note: True: it builds, but slowly.
    """

    node: str
    operator: str
    problem: str
    remedy: str
    note: bool = False


Problems = Iterator[tuple[str, str]]  # problem and remedy of each
Rule = Callable[[ir.Node, Parser], Problems]


def num_outputs(node: ir.Node) -> int:
    return len([output for output in node.outputs if output.name])


def number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value


def dtype_name(value: ir.Value) -> str:
    return "of unknown dtype" if value.dtype is None else value.dtype.name


def size_of(value: ir.Value | None, axis: int, rank: int) -> int | None:
    """Size of a value of this rank along an axis; None if it is not known, or the rank is another."""
    if value is None or value.shape is None or len(value.shape) != rank:
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def fixed_shape(value: ir.Value) -> tuple[int, ...] | None:
    """Shape of a value; None if a size is not known."""
    sizes = () if value.shape is None else tuple(value.shape)
    known = tuple(size for size in sizes if isinstance(size, int))
    return None if value.shape is None or len(known) < len(sizes) else known


def is_constant(value: ir.Value) -> bool:
    return ir.convenience.get_const_tensor(value) is not None


def constant(node: ir.Node, index: int) -> np.ndarray | None:
    value = node.inputs[index] if len(node.inputs) > index else None
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()
