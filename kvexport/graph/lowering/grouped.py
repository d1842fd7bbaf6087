"""Attention from matrix products in which every key and value is read once for all query heads that share it.

The queries of a group are stacked to rows, [batch, N, G·sequence, key_dim]: K and V are never expanded to the query
heads. Knows the arithmetic; must not know which engine runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from kvexport.bundle.graph_io import SEQUENCE
from kvexport.graph.lowering.matches import AttentionMatch, find_attention, require_removed
from kvexport.graph.nodes import Nodes, dtype_of, sizes
from kvexport.graph.weights import largest


@dataclass(frozen=True)
class KeyValues:
    """Keys and values of some slots: [batch, N, slots, key_dim] and [batch, N, slots, value_dim]."""

    key: ir.Value
    value: ir.Value


class GroupedAttention(ir.passes.InPlacePass):
    """Every Attention becomes grouped matrix products over the written caches, which stay in place.

    Pre-condition: attention of the standard form. Post-condition: no Attention is left.
    """

    def __init__(self, *, only_evicting: bool = False) -> None:
        """With `only_evicting`, that becomes it of layers that evict, whose KV heads serve several query heads."""
        self._only_evicting = only_evicting

    def requires(self, model: ir.Model) -> None:
        find_attention(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        matches = find_attention(model)
        chosen = [
            match
            for match in matches
            if not self._only_evicting or (match.state_write is not None and match.heads > match.kv_heads)
        ]
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
        if not self._only_evicting:
            require_removed(model, "Attention")


def grouped_attention(
    nodes: Nodes, match: AttentionMatch, segments: Sequence[KeyValues], bias: ir.Value
) -> ir.Value:
    """Softmax(scale · Q Kᵀ + bias) V over the slots of all `segments`, one after another: [batch, H, sequence, value_dim].

    `bias` is [batch, 1 or H, sequence, slots of all].
    """
    name, batch, heads, kv_heads = name_prefix(match), sizes(match.query)[0], match.heads, match.kv_heads
    slots = sizes(bias)[3]
    rows = SEQUENCE if heads == kv_heads else f"{heads // kv_heads}*{SEQUENCE}"
    scaled = nodes.op(
        "Mul", match.query, nodes.number(f"scale({match.scale:.9g})", match.scale), name=f"{name}.q.scaled"
    )
    query = _regrouped(
        nodes, scaled, kv_heads, (batch, kv_heads, rows, match.key_dim), f"{name}.q.grouped", heads
    )
    parts = [_scores(nodes, query, segment.key, f"{name}.scores.{i}") for i, segment in enumerate(segments)]
    scores = parts[0]
    if len(parts) > 1:
        scores = nodes.op(
            "Concat", *parts, name=f"{name}.scores", shape=(batch, kv_heads, rows, slots), axis=-1
        )
    scores = _regrouped(
        nodes, scores, heads, (batch, heads, SEQUENCE, slots), f"{name}.scores.by_head", kv_heads
    )
    biased = nodes.op("Add", scores, bias, name=f"{name}.scores.biased")
    weights = nodes.op("Softmax", biased, name=f"{name}.weights", axis=-1)
    weights = _regrouped(
        nodes, weights, kv_heads, (batch, kv_heads, rows, slots), f"{name}.weights.grouped", heads
    )
    shape = (batch, kv_heads, rows, match.value_dim)
    mixed = None
    for index, (part, segment) in enumerate(
        zip(_apart(nodes, weights, segments, name), segments, strict=True)
    ):
        product = nodes.op("MatMul", part, segment.value, name=f"{name}.mixed.{index}", shape=shape)
        mixed = product if mixed is None else nodes.op("Add", mixed, product, name=f"{name}.mixed.sum")
    assert mixed is not None
    return _regrouped(
        nodes, mixed, heads, (batch, heads, SEQUENCE, match.value_dim), f"{name}.mixed.by_head", kv_heads
    )


def attention_bias(nodes: Nodes, match: AttentionMatch) -> ir.Value:
    """What is added to the site's scores: its own bias, or 0 where its mask is true; made once for all that share it.

    A hidden slot gets half of the lowest number, so that the sum with any score stays finite.
    """
    if not match.biased:
        name = f"{match.mask.name}.bias"
        known = next(
            (use.node.outputs[0] for use in match.mask.uses() if use.node.outputs[0].name == name), None
        )
        if known is not None:
            return known
        seen, hidden = nodes.number("mask.seen", 0.0), nodes.number("mask.unseen", -largest(nodes.dtype) / 2)
        return nodes.op("Where", match.mask, seen, hidden, name=name, shape=sizes(match.mask))
    return match.mask


def replace_attention(model: ir.Model, match: AttentionMatch, mixed: ir.Value) -> None:
    """Take the site's Attention out; `mixed` is read in its place, under its name."""
    (old,) = match.node.outputs
    ir.convenience.replace_all_uses_with(old, mixed)
    name = old.name
    model.graph.remove(match.node, safe=True)
    mixed.name = name
    producer = mixed.producer()
    assert producer is not None
    producer.name = name


def _scores(nodes: Nodes, query: ir.Value, key: ir.Value, name: str) -> ir.Value:
    """[batch, N, rows, key_dim] · keysᵀ. ONNX Runtime fuses the transposition into the product; TensorRT, too."""
    batch, kv_heads, slots, width = sizes(key)
    turned = nodes.op(
        "Transpose", key, name=f"{name}.keys", shape=(batch, kv_heads, width, slots), perm=[0, 1, 3, 2]
    )
    return nodes.op("MatMul", query, turned, name=name, shape=(*sizes(query)[:3], slots))


def _apart(nodes: Nodes, weights: ir.Value, segments: Sequence[KeyValues], name: str) -> list[ir.Value]:
    """The weights of each memory's slots."""
    if len(segments) == 1:
        return [weights]
    first, second = segments  # a cache and what is new
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


def _regrouped(
    nodes: Nodes, x: ir.Value, to: int, shape: tuple[int | str, ...], name: str, of: int
) -> ir.Value:
    """[batch, of, rows, n] as [batch, to, rows', n]: the same numbers in the same order."""
    if to == of:
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
    """What the names of a site's nodes begin with."""
    name = match.node.outputs[0].name
    assert name is not None
    return name.removesuffix(".mixed")
