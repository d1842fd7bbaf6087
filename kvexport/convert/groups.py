"""Shapes of a layer's cache, and groups of adjacent KV heads that share one cached head.

Heads that are to share a cached head are made adjacent first (`kvexport.convert.permute`).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvexport.errors import UsageError
from kvexport.model.decoder import Attention

WIDEST = 256  # key or value heads that fused attention kernels take
_ROUNDED = 0.01  # relative: a ratio may be written with few digits, such as 0.33


@dataclass(frozen=True)
class KVShape:
    """Shape of one layer's cache: the number of KV heads, and the width of a key and of a value."""

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def kv_width(self) -> int:
        """Cached numbers per token."""
        return self.kv_heads * (self.key_dim + self.value_dim)


def trained_shape(attention: Attention) -> KVShape:
    """Shape of the cache before conversion."""
    return KVShape(attention.num_kv_heads, attention.key_dim, attention.value_dim)


@dataclass(frozen=True)
class Grouping:
    """Groups of `size` adjacent trained KV heads, each of which shares one of `kv_heads` cached heads.

    Attributes:
        kv_heads: number of groups G, and so of cached heads.
        size: trained KV heads per group, t.
        queries: query heads per trained KV head.
        head_dim: width of a trained KV head, d.
    """

    kv_heads: int
    size: int
    queries: int
    head_dim: int

    @classmethod
    def of(cls, attention: Attention, kv_heads: int) -> Grouping:
        """Group the attention's adjacent KV heads into `kv_heads` groups."""
        return cls(
            kv_heads, attention.num_kv_heads // kv_heads, attention.queries_per_kv_head, attention.head_dim
        )

    def rows(self, group: int) -> slice:
        """Rows of the group in the layer's stacked keys or values [h·d]."""
        width = self.size * self.head_dim
        return slice(group * width, (group + 1) * width)

    def query_heads(self, group: int) -> range:
        """Query heads that attend to the group."""
        count = self.size * self.queries
        return range(group * count, (group + 1) * count)

    def member(self, query_head: int) -> slice:
        """Rows of the query head's own trained KV head in the stack of its group [t·d]."""
        inside = query_head // self.queries % self.size
        return slice(inside * self.head_dim, (inside + 1) * self.head_dim)


def kv_heads_for(trained: int, kv_heads: int | None, kv_ratio: float | None) -> int:
    """Number of KV heads to keep out of `trained`, from `--kv-heads` or `--kv-ratio`; half of them without
    either.

    Raises:
        UsageError: both are given, or the number does not divide `trained`.
    """
    if kv_heads is not None and kv_ratio is not None:
        raise UsageError("--kv-heads and --kv-ratio must not be given together", fix="give one of them")
    possible = [count for count in range(1, trained + 1) if trained % count == 0]
    if kv_heads is None:
        ratio = 0.5 if kv_ratio is None else kv_ratio
        nearest = min(possible, key=lambda count: abs(count - ratio * trained))
        if ratio > 1 or not abs(nearest - ratio * trained) < _ROUNDED * nearest:
            raise UsageError(
                f"--kv-ratio must give a number of KV heads that divides the model's {trained}",
                got=f"--kv-ratio {ratio:g}: {ratio * trained:g} heads",
                expected="--kv-ratio " + ", ".join(f"{count / trained:.4g}" for count in possible),
                fix="choose a ratio from the list",
            )
        return nearest
    if kv_heads not in possible:
        raise UsageError(
            "--kv-heads must divide the model's KV heads, so that all groups have the same size",
            got=f"{kv_heads} of {trained}",
            expected=", ".join(map(str, possible)),
            fix="choose a number from the list",
        )
    return kv_heads
