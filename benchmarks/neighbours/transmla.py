"""TransMLA (Meng et al., arXiv 2502.07864), training-free: all heads share a rotated part and a latent
without position.

- RoRoPE: the KV heads' components of one rotary frequency are turned by a real orthogonal matrix, the same
  for both halves of the pair, which rotation commutes with: the eigenvectors of E[x xᵀ] + E[y yᵀ] over heads,
  largest first.
- FreqFold: `fold` adjacent frequencies are turned together, as if they were one.
- The leading components stay rotated, as one key that all heads share (`rotated` numbers; the paper's 'first
  head'). The rest loses its rotation.
- BKV: those unrotated components, scaled to the mean norm of the values, and the values are projected
  together on their leading `latent` directions.

Rotated numbers and latent share the budget. The paper fixes the rotated part at 64 and doubles the fold while
the model's perplexity improves; at other budgets it gives no rule, so here each layer takes the pair
(rotated, fold) whose attention output is closest to the trained one's on the first calibration windows. Costs
are those of the absorbed form: queries come to the latent, which is never expanded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvexport.calibrate import windows as attention_windows
from kvexport.model import reference
from kvexport.model.decoder import Attention, Decoder, Layer, Linear, Rope
from kvexport.model.rotation import rotary_tables, rotate

from .low_rank import leading
from .result import Macs, Neighbour, NeighbourLayer, convert_layers, require_plain_keys, whole
from .stream import LayerMoments, Stream, augmented

TRIED = 4  # windows
_NOTHING = 1e-6
ROUNDING = "rotated and latent numbers fill the budget of a layer, rounded down"


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention, absorbed: one cached row [rotated + latent] that all heads share."""

    trained: Attention  # q, o, scale, window
    down: Linear  # [rotated + latent, hidden]; the rotated part first, in half-split layout
    query_map: Tensor  # [h, d, rotated + latent]
    value_map: Tensor  # [h, latent, d]
    frequencies: Tensor  # float32 [rotated/2], radians per position

    @property
    def rotated(self) -> int:
        return 2 * len(self.frequencies)

    def __call__(self, x: Tensor) -> Tensor:
        """Attention output [B, S, hidden] of normed inputs at positions 0 .. S - 1."""
        trained, positions = self.trained, torch.arange(x.shape[1])[None]
        tables = rotary_tables(Rope(self.frequencies), positions, x.dtype)
        query = reference.linear(trained.q, x).unflatten(-1, (trained.num_heads, -1)).transpose(1, 2)
        shared = trained.queries_per_kv_head
        query = self._rotate(query @ self.query_map.repeat_interleave(shared, dim=0), tables)
        cached = self._rotate(reference.linear(self.down, x)[:, None], tables)  # [B, 1, S, rotated + latent]
        bias = reference.visibility(trained, positions, torch.arange(x.shape[1]), x.dtype)
        probabilities = reference.weights(query @ cached.transpose(-1, -2) * trained.scale + bias)
        mixed = probabilities @ cached[..., self.rotated :] @ self.value_map.repeat_interleave(shared, dim=0)
        return reference.linear(trained.o, mixed.transpose(1, 2).flatten(2))

    def _rotate(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        turned, rest = x[..., : self.rotated], x[..., self.rotated :]
        return torch.cat((rotate(turned, tables), rest), dim=-1)

    @property
    def macs(self) -> Macs:
        """In the absorbed form."""
        heads, width = self.trained.num_heads, len(self.down.weight)
        products = [self.trained.q.weight, self.trained.o.weight, self.down.weight]
        maps = self.trained.queries_per_kv_head * (self.query_map.numel() + self.value_map.numel())
        return Macs(
            per_cached_token=heads * (width + width - self.rotated),
            per_new_token=sum(each.numel() for each in products) + maps + 2 * (heads + 1) * self.rotated,
        )

    @property
    def parameters(self) -> int:
        linears = (self.trained.q, self.trained.o, self.down)
        biases = sum(each.bias.numel() for each in linears if each.bias is not None)
        return (
            sum(each.weight.numel() for each in linears)
            + biases
            + self.query_map.numel()
            + self.value_map.numel()
        )


def transmla(decoder: Decoder, windows: Tensor, kv_ratio: float) -> Neighbour:
    """TransMLA at `kv_ratio` of the trained KV numbers, calibrated on windows [N, S] of token ids."""

    def convert(layer: Layer, moments: LayerMoments, stream: Stream) -> NeighbourLayer:
        attention = layer.attention
        require_plain_keys(attention, "TransMLA")
        budget = whole(kv_ratio * 2 * attention.num_kv_heads * attention.head_dim)
        x = reference.normed(layer.attention_norm, stream.x[:TRIED])
        wanted = attention_windows.attend(attention, x)
        made = (latent_attention(attention, moments, *each, budget) for each in choices(attention, budget))
        best = min(made, key=lambda each: float((each(x) - wanted).double().square().sum()))
        return NeighbourLayer(layer, best, len(best.down.weight), best.macs, best.parameters)

    return Neighbour("transmla", decoder, convert_layers(decoder, windows, convert), ROUNDING)


def choices(attention: Attention, budget: int) -> Iterator[tuple[int, int]]:
    """(rotated, fold): half a head's width or whole heads stay rotated, at least one number is left for the
    latent."""
    width, heads = attention.head_dim, attention.num_kv_heads
    for rotated in (width // 2, *range(width, heads * width + 1, width)):
        fold = 1
        while fold <= width // 2:
            kept = rotated * fold // width  # components of each block of `fold` frequencies
            whole_blocks = (width // 2) % fold == 0 and kept * width == rotated * fold and kept > 0
            if whole_blocks and (kept >= fold or fold % kept == 0) and rotated < budget:
                yield rotated, fold
            fold *= 2


def rotation(keys: Tensor, heads: int, fold: int, rotated: int, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """RoRoPE: an orthogonal T [h·d, h·d] whose first `rotated` columns stay rotated, and their frequencies
    [rotated/2].

    Args:
        keys: E[k kᵀ] before rotation, [h·d, h·d].
        frequencies: of the trained model, [d/2].
    """
    half = len(frequencies)
    index = torch.arange(heads * 2 * half).view(
        heads, 2, half // fold, fold
    )  # head, x or y, block, frequency in it
    count = heads * fold
    kept = rotated * fold // (2 * half)
    first: list[list[Tensor]] = [[], []]
    rest, table = [], []
    for block in range(half // fold):
        halves = [index[:, side, block].flatten() for side in (0, 1)]  # head-major, [h·fold]
        turn = leading(sum((keys[rows][:, rows] for rows in halves), torch.zeros(())), count)
        for side, rows in enumerate(halves):
            column = keys.new_zeros(len(keys), count)
            column[rows] = turn
            first[side].append(column[:, :kept])
            rest.append(column[:, kept:])
        own = min(kept, fold)
        inside = torch.arange(kept) % max(own, 1) * (fold // max(own, 1))
        table.append(frequencies[block * fold + inside])
    return torch.cat((*first[0], *first[1], *rest), dim=1), torch.cat(table)


def latent_attention(
    attention: Attention, moments: LayerMoments, rotated: int, fold: int, budget: int
) -> LatentAttention:
    """A layer that caches `budget` numbers a token, or as many as there are, `rotated` of them rotated."""
    heads, width = attention.num_kv_heads, attention.head_dim
    assert attention.rope is not None
    turn, table = rotation(moments.outputs(attention.k), heads, fold, rotated, attention.rope.inv_freq)
    kept, free = turn[:, :rotated], turn[:, rotated:]
    key, value = augmented(attention.k), augmented(attention.v)
    joint = torch.cat((free.T @ key, value))  # [free + h·d, hidden + 1]
    power = (joint @ moments.inputs * joint).sum(1).clamp_min(0).sqrt()  # norms of the channels
    some = free.shape[1]
    balance = float(power[:some].mean() / power[some:].mean()) if some else 1.0
    balance = (
        balance if _NOTHING < balance < 1 / _NOTHING else 1.0
    )  # rounding errors are not to be made as long as values
    joint[:some] /= balance
    latent = min(budget - rotated, len(joint))
    basis = leading(joint @ moments.inputs @ joint.T, latent)
    down = torch.cat((kept.T @ key, basis.T @ joint)).to(attention.k.weight)
    query_map = torch.cat((kept, balance * free @ basis[:some]), dim=1).unflatten(0, (heads, width))
    biased = attention.k.bias is not None or attention.v.bias is not None
    return LatentAttention(
        trained=attention,
        down=Linear(down[:, :-1].contiguous(), down[:, -1].contiguous() if biased else None),
        query_map=query_map.to(down),
        value_map=basis[some:].unflatten(0, (heads, width)).transpose(1, 2).contiguous().to(down),
        frequencies=table,
    )
