"""Lower attention to matrix products that read every key and value once for all query heads that share it.

The queries of a group are stacked as rows, [batch, N, G·sequence, key_dim], so that K and V are never
expanded to the query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from kvexport.bundle.graph_io import SEQUENCE
from kvexport.graph.lowering.matches import AttentionMatch, find_attention
from kvexport.graph.nodes import Nodes, dtype_of, sizes
from kvexport.graph.weights import largest_number


@dataclass(frozen=True)
class KeyValues:
    """Keys [batch, N, slots, key_dim] and values [batch, N, slots, value_dim] of some slots."""

    key: ir.Value
    value: ir.Value


class GroupedAttention(ir.passes.InPlacePass):
    """Replace attention by grouped matrix products over the written caches, which stay in place.

    Pre-condition: attention of the standard form. Post-condition: no Attention that was to be replaced is
    left.
    """

    def __init__(self, replaces: Callable[[AttentionMatch], bool] = lambda match: True) -> None:
        """`replaces`: whether an Attention is replaced; by default, every one is."""
        self._replaces = replaces

    def requires(self, model: ir.Model) -> None:
        find_attention(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        chosen = [match for match in find_attention(model) if self._replaces(match)]
        for match in chosen:
            nodes = Nodes(model.graph, dtype_of(match.query), before=match.node)
            replace_attention(
                model,
                match,
                grouped_attention(
                    nodes, match, [KeyValues(match.key, match.value)], attention_bias(nodes, match)
                ),
            )
        return ir.passes.PassResult(model, bool(chosen))

    def ensures(self, model: ir.Model) -> None:
        for match in find_attention(model):
            if self._replaces(match):
                raise ir.passes.PostconditionError(f"Attention {match.node.name} is still in the graph")


def is_bounded_and_shared(match: AttentionMatch) -> bool:
    """Whether a layer evicts or has a ring, and its KV heads serve several query heads."""
    return match.heads > match.kv_heads and (match.ring is not None or match.state_write is not None)


def has_softcap(match: AttentionMatch) -> bool:
    """Whether the products of queries and keys are capped."""
    return match.softcap is not None


def grouped_attention(
    nodes: Nodes, match: AttentionMatch, segments: Sequence[KeyValues], bias: ir.Value
) -> ir.Value:
    """Softmax(softcap(scale · Q Kᵀ) + bias) V over the slots of all segments, concatenated.

    Args:
        bias: [batch, 1 or H, sequence, slots of all segments].

    Returns:
        [batch, H, sequence, value_dim].
    """
    name, batch, heads, kv_heads = name_prefix(match), sizes(match.query)[0], match.heads, match.kv_heads
    slots = sizes(bias)[3]
    rows = SEQUENCE if heads == kv_heads else f"{heads // kv_heads}*{SEQUENCE}"
    scaled = nodes.op(
        "Mul", match.query, nodes.number(f"scale({match.scale:.9g})", match.scale), name=f"{name}.q.scaled"
    )
    query = _regroup(
        nodes, scaled, kv_heads, (batch, kv_heads, rows, match.key_dim), f"{name}.q.grouped", heads
    )
    parts = [_scores(nodes, query, segment.key, f"{name}.scores.{i}") for i, segment in enumerate(segments)]
    scores = parts[0]
    if len(parts) > 1:
        scores = nodes.op(
            "Concat", *parts, name=f"{name}.scores", shape=(batch, kv_heads, rows, slots), axis=-1
        )
    scores = _regroup(
        nodes, scores, heads, (batch, heads, SEQUENCE, slots), f"{name}.scores.by_head", kv_heads
    )
    if match.softcap is not None:
        scores = _capped(nodes, scores, match.softcap, name)
    biased = nodes.op("Add", scores, bias, name=f"{name}.scores.biased")
    weights = nodes.op("Softmax", biased, name=f"{name}.weights", axis=-1)
    weights = _regroup(
        nodes, weights, kv_heads, (batch, kv_heads, rows, slots), f"{name}.weights.grouped", heads
    )
    shape = (batch, kv_heads, rows, match.value_dim)
    mixed = None
    for index, (part, segment) in enumerate(
        zip(_split_weights(nodes, weights, segments, name), segments, strict=True)
    ):
        product = nodes.op("MatMul", part, segment.value, name=f"{name}.mixed.{index}", shape=shape)
        mixed = product if mixed is None else nodes.op("Add", mixed, product, name=f"{name}.mixed.sum")
    assert mixed is not None
    return _regroup(
        nodes, mixed, heads, (batch, heads, SEQUENCE, match.value_dim), f"{name}.mixed.by_head", kv_heads
    )


def _capped(nodes: Nodes, scores: ir.Value, softcap: float, name: str) -> ir.Value:
    """softcap · tanh(scores / softcap)."""
    inverse, cap = (nodes.number(f"softcap({value:.9g})", value) for value in (1 / softcap, softcap))
    scaled = nodes.op("Mul", scores, inverse, name=f"{name}.scores.scaled")
    bounded = nodes.op("Tanh", scaled, name=f"{name}.scores.tanh")
    return nodes.op("Mul", bounded, cap, name=f"{name}.scores.capped")


def attention_bias(nodes: Nodes, match: AttentionMatch) -> ir.Value:
    """The bias to add to the scores: the match's own, or one made of its bool mask, once for each mask.

    Hidden slots get half of the lowest number, so that the sum with any score stays finite.
    """
    if not match.biased:
        name = f"{match.mask.name}.bias"
        existing = next(
            (use.node.outputs[0] for use in match.mask.uses() if use.node.outputs[0].name == name), None
        )
        if existing is not None:
            return existing
        visible, hidden = (
            nodes.number("mask.seen", 0.0),
            nodes.number("mask.unseen", -largest_number(nodes.dtype) / 2),
        )
        return nodes.op("Where", match.mask, visible, hidden, name=name, shape=sizes(match.mask))
    return match.mask


def replace_attention(model: ir.Model, match: AttentionMatch, mixed: ir.Value) -> None:
    """Replace the Attention by `mixed`, which takes over its name."""
    (old,) = match.node.outputs
    ir.convenience.replace_all_uses_with(old, mixed)
    name = old.name
    model.graph.remove(match.node, safe=True)
    mixed.name = name
    producer = mixed.producer()
    assert producer is not None
    producer.name = name


def _scores(nodes: Nodes, query: ir.Value, key: ir.Value, name: str) -> ir.Value:
    """query [batch, N, rows, key_dim] · keysᵀ. ONNX Runtime and TensorRT fuse Transpose into MatMul."""
    batch, kv_heads, slots, width = sizes(key)
    transposed = nodes.op(
        "Transpose", key, name=f"{name}.keys", shape=(batch, kv_heads, width, slots), perm=[0, 1, 3, 2]
    )
    return nodes.op("MatMul", query, transposed, name=name, shape=(*sizes(query)[:3], slots))


def _split_weights(
    nodes: Nodes, weights: ir.Value, segments: Sequence[KeyValues], name: str
) -> list[ir.Value]:
    """Split the attention weights by segment."""
    if len(segments) == 1:
        return [weights]
    first, second = segments  # the cache and the new tokens
    shape = nodes.op("Shape", first.key, name=f"{name}.cache_shape", shape=(4,), dtype="int64")
    edge = nodes.op(
        "Gather", shape, nodes.integers(2), name=f"{name}.slots", shape=(1,), dtype="int64", axis=0
    )
    lead, axes = sizes(weights)[:3], nodes.integers(3)
    last = nodes.integers(2**63 - 1)
    return [
        nodes.op(
            "Slice",
            weights,
            start,
            stop,
            axes,
            name=f"{name}.weights.{i}",
            shape=(*lead, sizes(segment.key)[2]),
        )
        for i, (segment, start, stop) in enumerate(((first, nodes.integers(0), edge), (second, edge, last)))
    ]


def _regroup(
    nodes: Nodes, x: ir.Value, to: int, shape: tuple[int | str, ...], name: str, heads: int
) -> ir.Value:
    """Reshape x [batch, heads, rows, n] to [batch, to, rows', n]."""
    if to == heads:
        return x
    width = shape[3]
    return nodes.op(
        "Reshape",
        x,
        nodes.integers(0, to, -1, width if isinstance(width, int) else 0),
        name=name,
        shape=shape,
    )


def name_prefix(match: AttentionMatch) -> str:
    """Prefix of the names of the nodes that replace a match."""
    name = match.node.outputs[0].name
    assert name is not None
    return name.removesuffix(".mixed")
