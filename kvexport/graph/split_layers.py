"""A decoder graph in parts that run one after another: the embedding, each layer, the head.

Knows where a layer begins and ends, and that a part carries along whatever it shares with others (masks, rotary
tables); must not know who runs it, nor what is compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from kvexport.bundle.graph_io import (
    KEY,
    STATE,
    VALUE,
    attention_residual,
    attention_tap,
    present,
    residual_tap,
)
from kvexport.graph.taps import GraphCopy, serialize, widen


def split_layers(path: Path, num_layers: int, *, in_float32: bool) -> Iterator[GraphCopy]:
    """The graph at `path` as num_layers + 2 graphs, each made when asked for, with only the weights that it needs.

    A part takes the residual stream under the name that the part before gave it, and those inputs of the whole
    graph that it depends on: the shape of the first layer's key cache, from which masks are made, is one of them
    for every layer. A layer gives its attention output, its residual stream and its caches; the head gives logits.

    Args:
        in_float32: as `kvexport.graph.as_float32`, of one part's weights at a time.
    """
    whole = ir.load(path).graph
    stream, outputs = _embedded(whole), {value.name for value in whole.outputs}
    yield _part(path, None, [stream], in_float32)
    for layer in range(num_layers):
        caches = [
            name for name in (present(layer, which) for which in (KEY, VALUE, STATE)) if name in outputs
        ]
        yield _part(path, stream, [attention_tap(layer), residual_tap(layer), *caches], in_float32)
        stream = residual_tap(layer)
    yield _part(path, stream, ["logits"], in_float32)


def _embedded(graph: ir.Graph) -> str:
    """Name of the residual stream that enters the first layer: what its attention's output is added to."""
    (add,) = (node for node in graph if node.name == attention_residual(0))
    (stream,) = (name for name in map(_before_casts, add.inputs) if name != attention_tap(0))
    return stream


def _before_casts(value: ir.Value | None) -> str:
    assert value is not None and value.name is not None
    producer = value.producer()
    return (
        _before_casts(producer.inputs[0])
        if producer is not None and producer.op_type == "Cast"
        else value.name
    )


def _part(path: Path, entry: str | None, exits: list[str], in_float32: bool) -> GraphCopy:
    whole = ir.load(path)  # anew for each part: widening changes it
    inputs: list[ir.Value | str] = [*whole.graph.inputs, *([] if entry is None else [entry])]
    graph = ir.convenience.extract(whole.graph, inputs, exits)
    for value in [value for value in graph.inputs if not value.uses()]:
        graph.inputs.remove(value)
    weights = widen(graph) if in_float32 else {}
    return GraphCopy(serialize(ir.Model(graph, ir_version=whole.ir_version)), path.parent, weights)
