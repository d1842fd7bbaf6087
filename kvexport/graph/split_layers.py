"""Split a decoder graph into parts that run one after another: the embedding, each layer, the head.

Values that several parts share (masks, rotary tables) are computed in each of them.
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
    """Split the graph at `path` into num_layers + 2 graphs, made lazily, each with only its own weights.

    The inputs of a part are the residual stream, named as the part before names its output, and the inputs of
    the whole graph that it depends on. For every layer these include the first layer's key cache: masks are
    made from its shape. The outputs of a layer are its attention output, its residual stream and its caches;
    the output of the head is the logits.

    Args:
        num_layers: layers of the decoder.
        in_float32: compute in float32, as `kvexport.graph.as_float32` does; the weights of one part at a time
            are in memory.
    """
    whole = ir.load(path).graph
    stream, outputs = _first_stream(whole), {value.name for value in whole.outputs}
    yield _part(path, None, [stream], in_float32)
    for layer in range(num_layers):
        caches = [
            name for name in (present(layer, which) for which in (KEY, VALUE, STATE)) if name in outputs
        ]
        yield _part(path, stream, [attention_tap(layer), residual_tap(layer), *caches], in_float32)
        stream = residual_tap(layer)
    yield _part(path, stream, ["logits"], in_float32)


def _first_stream(graph: ir.Graph) -> str:
    """Name of the residual stream before the first layer: the other summand of its attention residual."""
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
    whole = ir.load(path)  # loaded for each part, since widen() changes it
    inputs: list[ir.Value | str] = [*whole.graph.inputs, *([] if entry is None else [entry])]
    graph = ir.convenience.extract(whole.graph, inputs, exits)
    for value in [value for value in graph.inputs if not value.uses()]:
        graph.inputs.remove(value)
    weights = widen(graph) if in_float32 else {}
    return GraphCopy(serialize(ir.Model(graph, ir_version=whole.ir_version)), path.parent, weights)
