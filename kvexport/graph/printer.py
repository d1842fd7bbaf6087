"""Print a graph as text for review: one line for each input, initializer, node and output, without weights.

The text is deterministic; the golden files of the tests are made with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir


def render(path: Path) -> str:
    """The text of the model at `path`; its external data is not read."""
    model = ir.load(path)
    return "\n".join(_lines(model)) + "\n"


def _lines(model: ir.Model) -> Iterator[str]:
    graph = model.graph
    opsets = ", ".join(
        f"{domain or 'default'} {version}" for domain, version in sorted(model.opset_imports.items())
    )
    yield f"graph {graph.name}: opset {opsets}; ir {model.ir_version}"
    yield from _section("inputs", (_typed(value) for value in graph.inputs))
    yield from _section("initializers", (_initializer(value) for value in graph.initializers.values()))
    yield from _section("nodes", (_node(node) for node in graph))
    yield from _section("outputs", (_typed(value) for value in graph.outputs))


def _section(title: str, lines: Iterator[str]) -> Iterator[str]:
    yield ""
    yield title
    yield from (f"  {line}" for line in lines)


def _typed(value: ir.Value) -> str:
    dtype = "?" if value.dtype is None else value.dtype.numpy().name
    if value.shape is None:
        return f"{value.name}: {dtype}[?]"
    sizes = (str(size.value) if isinstance(size, ir.SymbolicDim) else str(size) for size in value.shape)
    return f"{value.name}: {dtype}[{', '.join(sizes)}]"


def _initializer(value: ir.Value) -> str:
    where = "external" if isinstance(value.const_value, ir.ExternalTensor) else "inline"
    return f"{_typed(value)} {where}"


def _node(node: ir.Node) -> str:
    outputs = ", ".join(_typed(value) for value in node.outputs)
    inputs = ", ".join("" if value is None else str(value.name) for value in node.inputs)
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    label = "" if node.name == node.outputs[0].name else f" as {node.name}"
    attributes = "".join(
        f" {name}={_attribute(attribute)}" for name, attribute in sorted(node.attributes.items())
    )
    return f"{outputs} = {operator}({inputs}){attributes}{label}"


def _attribute(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.FLOAT:
        return str(np.float32(attribute.as_float()))  # the shortest text that reads back as the same number
    return str(attribute.value)
