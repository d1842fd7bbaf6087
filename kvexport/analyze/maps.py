"""Attention maps of a trained and of a converted model over one window of text, side by side.

Knows the reference's attention, and how maps are written small; must not know how a layer was converted.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvexport.errors import UsageError
from kvexport.model import reference
from kvexport.model.decoder import Attention, Decoder, Layer, Rope

CODING = (
    "for each layer and head the weights of query 0 on key 0, of query 1 on keys 0 and 1, and so on; "
    "base64 of one byte q each, the weight being (q / 255) squared"
)


@dataclass(frozen=True)
class AttentionMaps:
    """Attention weights of one window of S tokens. Each model ran on its own residual stream from the first layer on.

    Attributes:
        original, compressed: one tensor [H, S, S] a layer, row: query, column: key.
    """

    original: tuple[Tensor, ...]
    compressed: tuple[Tensor, ...]

    def distance(self) -> list[list[float]]:
        """How far the maps of each layer and head are apart: total variation ½ Σ_n |a_mn - b_mn|, mean over queries m."""
        pairs = zip(self.original, self.compressed, strict=True)
        return [(a - b).abs().sum(-1).mean(-1).div(2).tolist() for a, b in pairs]

    def weights(self, query: int, key: int) -> tuple[list[list[float]], list[list[float]]]:
        """The weight of `query` on `key` in both models, by layer and head."""
        original, compressed = (
            [each[:, query, key].tolist() for each in side] for side in (self.original, self.compressed)
        )
        return original, compressed


class MapRecorder:
    """Runs a window through both models, a layer at a time."""

    @torch.no_grad()
    def __init__(self, decoder: Decoder, window: Tensor) -> None:
        """`window`: token ids [S] int64."""
        self._rope = decoder.rope
        self._positions = torch.arange(len(window))[None]
        self._original = self._compressed = reference.embed(decoder.embedding, window[None])
        self._maps: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def add(self, trained: Layer, converted: Layer) -> None:
        """Take both residual streams past the next layer."""
        original, self._original = self._pass(trained, self._original)
        compressed, self._compressed = self._pass(converted, self._compressed)
        places = torch.tensor(head_places(trained.attention, converted.attention))
        self._maps.append((original, compressed[places]))

    def _pass(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = attention_map(layer.attention, reference.norm(layer.attention_norm, x), self._rope)
        return probabilities[0], reference.run_layer(layer, x, self._positions, self._rope).residual

    def finish(self) -> AttentionMaps:
        return AttentionMaps(tuple(a for a, _ in self._maps), tuple(b for _, b in self._maps))


def attention_map(attention: Attention, x: Tensor, rope: Rope | None) -> Tensor:
    """Attention weights [B, H, S, S] of normed inputs [B, S, hidden] at positions 0..S-1."""
    positions = torch.arange(x.shape[1]).expand(x.shape[:2])
    tables = None if rope is None else reference.rotary_tables(rope, positions, x.dtype)
    projected = reference.project(attention, x, tables)
    query = reference.map_queries(attention, projected.query_rotated)
    key = reference.map_keys(attention, projected.key_rotated)
    bias = reference.visibility(attention, positions, torch.arange(x.shape[1]), x.dtype)
    return reference.weights(reference.scores(attention, query, key) + bias)


def head_places(trained: Attention, converted: Attention) -> list[int]:
    """Where each trained query head stands in the converted layer, [H]: conversion may change their order.

    A code makes the queries of a head from those of one trained head, so the rows of its W_Q lie in the span of that
    head's rows: each head goes where most of the rows' power is in its span.
    """
    heads = trained.num_heads
    spans = torch.linalg.qr(trained.q.weight.double().unflatten(0, (heads, -1)).mT).Q  # [H, hidden, head_dim]
    rows = converted.q.weight.double().unflatten(0, (heads, -1))  # [H, r, hidden]
    inside = torch.stack([(rows @ span).square().sum((1, 2)) for span in spans])  # [trained, converted]
    share = inside / rows.square().sum((1, 2)).clamp_min(torch.finfo(torch.float64).tiny)
    places = [-1] * heads
    for _ in range(heads):
        head, place = divmod(int(share.argmax()), heads)
        places[head] = place
        share[head], share[:, place] = -1.0, -1.0
    return places


def packed(maps: Tensor) -> list[str]:
    """Maps [H, S, S] as `CODING` says; the square root keeps small weights apart."""
    rows, columns = torch.tril_indices(*maps.shape[1:])
    codes = (maps[:, rows, columns].double().sqrt() * 255).round().to(torch.uint8)
    return [base64.b64encode(each.numpy().tobytes()).decode() for each in codes]


def parse_pairs(said: str, tokens: int) -> list[tuple[int, int]]:
    """Query and key positions from `--pairs`, such as 12:3,20:4.

    Raises:
        UsageError: not such a list, or positions where a query sees no key.
    """
    return [_pair(each.strip(), tokens) for each in said.split(",")]


def _pair(said: str, tokens: int) -> tuple[int, int]:
    parts: Sequence[str] = said.split(":")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise UsageError(
            "--pairs is no list of positions",
            got=repr(said),
            expected="QUERY:KEY,QUERY:KEY, such as 12:3,20:4",
        )
    query, key = int(parts[0]), int(parts[1])
    if not key <= query < tokens:
        raise UsageError(
            "--pairs names positions where no query sees a key",
            got=said,
            expected=f"0 <= KEY <= QUERY <= {tokens - 1}, the last of {tokens} tokens",
            fix="choose others, or raise --tokens",
        )
    return query, key
