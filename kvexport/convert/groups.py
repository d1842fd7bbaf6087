"""What a converted layer caches, and which KV heads share one: adjacent ones, in groups of one size.

Knows counts of heads, widths, and the slices they mean; nothing of weights. Heads that are to share one are made
adjacent first (`kvexport.convert.permute`).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvexport.errors import UsageError
from kvexport.model.decoder import Attention

WIDEST = 256  # key or value heads that fused attention kernels take
_ROUNDED = 0.01  # a ratio may be written with few digits, such as 0.33


@dataclass(frozen=True)
class KVShape:
    """What one layer caches: so many KV heads, of keys and values so wide."""

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def kv_width(self) -> int:
        """Cached numbers per token."""
        return self.kv_heads * (self.key_dim + self.value_dim)


def trained_shape(attention: Attention) -> KVShape:
    """What the layer caches now."""
    return KVShape(attention.num_kv_heads, attention.key_dim, attention.value_dim)


@dataclass(frozen=True)
class Grouping:
    """`kv_heads` cached heads, each standing for `size` adjacent ones of the trained model.

    Attributes:
        queries: query heads that share one KV head of the trained model.
        head_dim: width of a trained KV head.
    """

    kv_heads: int
    size: int
    queries: int
    head_dim: int

    @classmethod
    def of(cls, attention: Attention, kv_heads: int) -> Grouping:
        """The attention's adjacent KV heads in `kv_heads` groups."""
        return cls(
            kv_heads, attention.num_kv_heads // kv_heads, attention.queries_per_kv_head, attention.head_dim
        )

    def rows(self, group: int) -> slice:
        """The group's rows among the trained model's stacked keys or values [h·head_dim]."""
        width = self.size * self.head_dim
        return slice(group * width, (group + 1) * width)

    def query_heads(self, group: int) -> range:
        """The query heads that attend to the group."""
        count = self.size * self.queries
        return range(group * count, (group + 1) * count)

    def member(self, query_head: int) -> slice:
        """The rows of a query head's own KV head within its group's stack [size·head_dim]."""
        inside = query_head // self.queries % self.size
        return slice(inside * self.head_dim, (inside + 1) * self.head_dim)


def kv_heads_for(trained: int, kv_heads: int | None, kv_ratio: float | None) -> int:
    """How many KV heads to keep of `trained`, from `--kv-heads` or `--kv-ratio` (neither: half).

    Raises:
        UsageError: both are given, or the count does not divide the trained one; lists those that do.
    """
    if kv_heads is not None and kv_ratio is not None:
        raise UsageError("--kv-heads and --kv-ratio say the same thing twice", fix="give one of them")
    possible = [count for count in range(1, trained + 1) if trained % count == 0]
    if kv_heads is None:
        ratio = 0.5 if kv_ratio is None else kv_ratio
        nearest = min(possible, key=lambda count: abs(count - ratio * trained))
        if ratio > 1 or not abs(nearest - ratio * trained) < _ROUNDED * nearest:
            raise UsageError(
                f"no number of KV heads is {ratio:g} of the model's {trained}",
                got=f"{ratio * trained:g} heads",
                expected="--kv-ratio " + ", ".join(f"{count / trained:.4g}" for count in possible),
                fix="choose a ratio from the list",
            )
        return nearest
    if kv_heads not in possible:
        raise UsageError(
            "--kv-heads must divide the model's KV heads, so that all groups are of one size",
            got=f"{kv_heads} of {trained}",
            expected=", ".join(map(str, possible)),
            fix="choose a number from the list",
        )
    return kv_heads
