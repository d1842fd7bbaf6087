"""Attention maps of a trained and of a converted model over one window of text."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvexport.errors import UsageError
from kvexport.model import reference
from kvexport.model.decoder import Attention, Decoder, Layer

CODING = (
    "for each layer and head the weights of query 0 on key 0, of query 1 on keys 0 and 1, and so on; "
    "base64 of one byte q each, the weight being (q / 255) squared"
)


@dataclass(frozen=True)
class AttentionMaps:
    """Attention weights of both models on one window of S tokens, each model on its own residual stream.

    Attributes:
        original: one tensor [H, S, S] per layer, rows are queries, columns are keys.
        compressed: the same for the converted model, heads in the order of the trained one.
    """

    original: tuple[Tensor, ...]
    compressed: tuple[Tensor, ...]

    def distance(self) -> list[list[float]]:
        """Total variation ½ Σ_n |a_mn - b_mn| of both maps by layer and head, mean over queries m."""
        pairs = zip(self.original, self.compressed, strict=True)
        return [(a - b).abs().sum(-1).mean(-1).div(2).tolist() for a, b in pairs]

    def weights(self, query: int, key: int) -> tuple[list[list[float]], list[list[float]]]:
        """Weight of position `query` on position `key` in both models, by layer and head."""
        original, compressed = (
            [each[:, query, key].tolist() for each in side] for side in (self.original, self.compressed)
        )
        return original, compressed


class MapRecorder:
    """Runs a window through both models layer by layer and records the maps."""

    @torch.no_grad()
    def __init__(self, decoder: Decoder, window: Tensor) -> None:
        """`window`: token ids [S] int64."""
        self._original = self._compressed = reference.embed(decoder.embedding, window[None])
        self._positions = torch.arange(len(window), device=self._original.device)[None]
        self._maps: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def add(self, trained: Layer, converted: Layer) -> None:
        """Advance both residual streams past the next layer and record its maps."""
        original, self._original = self._pass(trained, self._original)
        compressed, self._compressed = self._pass(converted, self._compressed)
        places = torch.tensor(head_places(trained.attention, converted.attention))
        self._maps.append((original.cpu(), compressed.cpu()[places]))

    def _pass(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = attention_map(layer.attention, reference.normed(layer.attention_norm, x))
        return probabilities[0], reference.run_layer(layer, x, self._positions).residual

    def finish(self) -> AttentionMaps:
        """The maps of all layers added."""
        return AttentionMaps(tuple(a for a, _ in self._maps), tuple(b for _, b in self._maps))


def attention_map(attention: Attention, x: Tensor) -> Tensor:
    """Attention weights [B, H, S, S] of normed inputs x [B, S, hidden] at positions 0 .. S - 1."""
    slots = torch.arange(x.shape[1], device=x.device)
    positions = slots.expand(x.shape[:2])
    projected = reference.project(attention, x, positions)
    query = reference.map_queries(attention, projected.query_rotated)
    key = reference.map_keys(attention, projected.key_rotated)
    bias = reference.visibility(attention, positions, slots, x.dtype)
    return reference.weights(reference.scores(attention, query, key) + bias)


def head_places(trained: Attention, converted: Attention) -> list[int]:
    """Index of each trained query head in the converted layer, [H]; conversion may reorder heads.

    A code makes the queries of a head from those of one trained head, so the rows of its W_Q lie in the span
    of that head's rows: heads are matched by the share of the rows' power in the span, greedily.
    """
    heads = trained.num_heads
    trained_rows, rows = (  # [H, head_dim, hidden] and [H, r, hidden]
        each.q.weight.cpu().double().unflatten(0, (heads, -1)) for each in (trained, converted)
    )
    spans = torch.linalg.qr(trained_rows.mT).Q  # [H, hidden, head_dim]
    inside = torch.stack([(rows @ span).square().sum((1, 2)) for span in spans])  # [trained, converted]
    share = inside / rows.square().sum((1, 2)).clamp_min(torch.finfo(torch.float64).tiny)
    places = [-1] * heads
    for _ in range(heads):
        head, place = divmod(int(share.argmax()), heads)
        places[head] = place
        share[head], share[:, place] = -1.0, -1.0
    return places


def packed(maps: Tensor) -> list[str]:
    """Maps [H, S, S] coded as in `CODING`; the square root gives small weights more resolution."""
    rows, columns = torch.tril_indices(*maps.shape[1:])
    codes = (maps[:, rows, columns].double().sqrt() * 255).round().to(torch.uint8)
    return [base64.b64encode(each.numpy().tobytes()).decode() for each in codes]


def parse_pairs(text: str, tokens: int) -> list[tuple[int, int]]:
    """Query and key positions from `--pairs`, such as 12:3,20:4, in a window of `tokens` tokens.

    Raises:
        UsageError: the text is not such a list, or a query does not see its key.
    """
    return [_pair(each.strip(), tokens) for each in text.split(",")]


def _pair(text: str, tokens: int) -> tuple[int, int]:
    parts: Sequence[str] = text.split(":")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise UsageError(
            "--pairs must be a list of positions",
            got=repr(text),
            expected="QUERY:KEY,QUERY:KEY, such as 12:3,20:4",
        )
    query, key = int(parts[0]), int(parts[1])
    if not key <= query < tokens:
        raise UsageError(
            "--pairs must be positions of the text, with no key after its query",
            got=text,
            expected=f"0 <= KEY <= QUERY <= {tokens - 1}, the last of {tokens} tokens",
            fix="choose other positions, or raise --tokens",
        )
    return query, key
