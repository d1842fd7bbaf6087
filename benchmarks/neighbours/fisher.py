"""Palu's rank search: each layer's keys and values get ranks in proportion to their Fisher information.

The Fisher information of a projection is the mean over its weights of sqrt(mean over windows of grad²), of
the next-token loss. Ranks of a layer are split evenly over its groups (the released 'fisher_uniform', without
its rounding to 32, and with what a full projection cannot take given to the others). Needs the whole model in
memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer

from .grouping import group_size
from .palu import palu_layer
from .recalkv import recalkv_layer
from .result import Neighbour, NeighbourLayer, convert_layers, require_trained, whole
from .stream import LayerMoments, Stream

WINDOWS = 32  # at most: gradients of the whole model, one window at a time
ROUNDING = "ranks by Fisher information, rounded by largest remainder within the budget"


def palu_fisher(decoder: Decoder, windows: Tensor, kv_ratio: float) -> Neighbour:
    """`palu` with the paper's rank search."""
    ranks = iter(searched(decoder, windows, kv_ratio, value_groups=True))

    def convert(layer: Layer, moments: LayerMoments, stream: Stream) -> NeighbourLayer:
        return palu_layer(layer, moments, *next(ranks))

    return Neighbour("palu-fisher", decoder, convert_layers(decoder, windows, convert), ROUNDING)


def recalkv_fisher(decoder: Decoder, windows: Tensor, kv_ratio: float) -> Neighbour:
    """`recalkv` with the paper's rank search."""
    ranks, converted = (
        iter(searched(decoder, windows, kv_ratio, value_groups=False)),
        Stream(decoder, windows),
    )

    def convert(layer: Layer, moments: LayerMoments, stream: Stream) -> NeighbourLayer:
        return recalkv_layer(layer, moments, converted, *next(ranks))

    return Neighbour("recalkv-fisher", decoder, convert_layers(decoder, windows, convert), ROUNDING)


def searched(decoder: Decoder, windows: Tensor, kv_ratio: float, value_groups: bool) -> list[tuple[int, int]]:
    """Ranks of one group of each layer's keys, and of its values (`value_groups`), or of all its values."""
    heads = [layer.attention.num_kv_heads for layer in decoder.layers]
    full = [
        count * layer.attention.head_dim
        for count, layer in zip(heads, decoder.layers, strict=True)
        for _ in range(2)
    ]
    parts = [
        part
        for count in heads
        for part in (count // group_size(count), count // group_size(count) if value_groups else 1)
    ]
    shares = allocate(fisher(decoder, windows[:WINDOWS]), full, kv_ratio * sum(full))
    ranks = rounded(shares, full, parts, kv_ratio * sum(full))
    return list(zip(ranks[0::2], ranks[1::2], strict=True))


def fisher(decoder: Decoder, windows: Tensor) -> list[float]:
    """The information of every layer's W_K and W_V in turn: [k0, v0, k1, v1, ...]."""
    layers, weights = [], []
    for layer in decoder.layers:
        attention = layer.attention
        require_trained(attention)
        k, v = (
            dataclasses.replace(each, weight=each.weight.clone().requires_grad_())
            for each in (attention.k, attention.v)
        )
        layers.append(dataclasses.replace(layer, attention=dataclasses.replace(attention, k=k, v=v)))
        weights += [k.weight, v.weight]
    squares = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]
    with torch.enable_grad():
        for window in windows:
            x, positions = reference.embed(decoder.embedding, window[None]), torch.arange(len(window))[None]
            for layer in layers:
                x = reference.run_layer(layer, x, positions).residual
            loss = F.cross_entropy(reference.logits(decoder, x)[0, :-1], window[1:])
            for square, gradient in zip(squares, torch.autograd.grad(loss, weights), strict=True):
                square += gradient.double().square()
    return [float((square / len(windows)).sqrt().mean()) for square in squares]


def allocate(shares: Sequence[float], full: Sequence[int], total: float) -> list[float]:
    """`total` in proportion to `shares`, none above its `full`: what a full one cannot take goes to the
    others."""
    given = [0.0] * len(shares)
    free = [at for at, share in enumerate(shares) if share > 0]
    while free and total > sum(given) + 1e-9:
        rest, power = total - sum(given), sum(shares[at] for at in free)
        for at in free:
            given[at] = min(float(full[at]), given[at] + rest * shares[at] / power)
        free = [at for at in free if given[at] < full[at]]
    return given


def rounded(numbers: Sequence[float], full: Sequence[int], parts: Sequence[int], total: float) -> list[int]:
    """Ranks of each of `parts` equal groups: at least 1, `numbers` rounded down, then up by the largest
    remainder.

    Raises:
        UsageError: `total` is below one rank a group.
    """
    ranks = [max(1, int(number / part + 1e-9)) for number, part in zip(numbers, parts, strict=True)]

    def left() -> float:
        return total + 1e-9 - sum(rank * part for rank, part in zip(ranks, parts, strict=True))

    while left() < 0:  # what the ones took too much, the largest give back
        at = max(range(len(ranks)), key=lambda at: ranks[at])
        ranks[at] = whole(ranks[at] - 1)
    for at in sorted(range(len(ranks)), key=lambda at: ranks[at] - numbers[at] / parts[at]):
        if parts[at] <= left() and (ranks[at] + 1) * parts[at] <= full[at]:
            ranks[at] += 1
    return ranks
