"""The PyTorch reference of a cache with a token budget: slots, each with its token's score and position.

The graph does the same in ONNX operators, and the runtime when it makes room for the chunks of a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvexport.eviction.config import (
    LATER,
    LATEST,
    NEVER,
    POSITION_PLUS_ONE,
    SCORE,
    STATE_WIDTH,
    UNSEEN,
    Eviction,
    random_offsets,
    random_scores,
)


@dataclass
class EvictingCache:
    """The cache of a layer that evicts. Every KV head has its own tokens.

    Attributes:
        key, value: [B, Hkv, C, key_dim] and [B, Hkv, C, value_dim].
        state: [B, Hkv, C, 2], score and position + 1 of each slot's token, 0 if it is empty; float32, or
            float64 if the keys are.
        filled: slots in use [B], equal in all heads.
        eviction: the policy.
        layer: index of the layer.
        capacity: number of positions; with `layer` it selects the scores of the policy "random".
        window: sliding window of the layer's attention; tokens that left it are evicted before all others.
            None: full attention.
    """

    key: Tensor
    value: Tensor
    state: Tensor
    filled: Tensor
    eviction: Eviction
    layer: int
    capacity: int
    window: int | None = None

    @classmethod
    def empty(
        cls,
        batch: int,
        heads: int,
        widths: tuple[int, int],
        dtype: torch.dtype,
        eviction: Eviction,
        layer: int,
        capacity: int,
        window: int | None = None,
        slots: int | None = None,
    ) -> EvictingCache:
        """An empty cache of `slots` slots; None: of the budget."""
        count, precise = slots or eviction.budget, torch.promote_types(dtype, torch.float32)
        key, value = (torch.zeros(batch, heads, count, width, dtype=dtype) for width in widths)
        state = torch.zeros(batch, heads, count, STATE_WIDTH, dtype=precise)
        return cls(
            key, value, state, torch.zeros(batch, dtype=torch.int64), eviction, layer, capacity, window
        )

    @property
    def slots(self) -> int:
        """Number of slots C."""
        return self.key.shape[2]

    @property
    def positions(self) -> Tensor:
        """Position of the token in each slot, int64 [B, Hkv, C]; -1 if it is empty."""
        return self.state[..., POSITION_PLUS_ONE].long() - 1

    def write(self, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        """Write tokens behind those in the cache.

        If there is no room, a single token replaces the one of highest priority, and several tokens make room
        for all of them first.

        Args:
            key, value: [B, Hkv, S, key_dim] and [B, Hkv, S, value_dim].
            positions: consecutive [B, S].

        Returns:
            The slots, int64 [B, Hkv, S].
        """
        batch, heads, count = key.shape[:3]
        if count > 1:
            self.make_room(count, positions[:, 0])
        slots = self.filled[:, None, None] + torch.arange(count).expand(batch, heads, count)
        if count == 1:
            full = (self.filled + 1 > self.slots)[:, None, None]
            slots = torch.where(full, self.priorities(positions[:, 0]).argmax(-1, keepdim=True), slots)
        state = torch.stack(
            (self.scores(key, positions), (positions + 1)[:, None].expand(batch, heads, count)), -1
        )
        for buffer, new in ((self.key, key), (self.value, value), (self.state, state.to(self.state))):
            buffer.scatter_(2, slots[..., None].expand_as(new), new)
        self.filled = (self.filled + count).clamp(max=self.slots)
        return slots

    def scores(self, key: Tensor, positions: Tensor) -> Tensor:
        """Scores of new tokens [B, Hkv, S]; the highest is evicted first.

        Of two tokens with equal norms, the older one is evicted first.
        """
        heads, at = key.shape[1], positions[:, None]
        if self.eviction.policy == "window":
            return -at.expand(-1, heads, -1).to(self.state)
        if self.eviction.policy == "random":
            offsets = torch.from_numpy(random_offsets(self.layer, heads, self.capacity))
            return torch.from_numpy(random_scores(self.capacity)).to(self.state)[at + offsets[:, None]]
        norms, later = key.to(self.state).norm(dim=-1), (at + 1).to(self.state) * LATER
        return norms * (1 - later) if self.eviction.policy == "l2-norm" else -norms * (1 + later)

    def priorities(self, positions: Tensor, recent: int | None = None) -> Tensor:
        """Priorities of all slots [B, Hkv, C], which must be in use; the highest is overwritten.

        A slot with the same position comes first, then tokens that left the attention's window.

        Args:
            positions: positions of the new token [B].
            recent: number of last positions that are protected, the new one included; None: as the policy
                says.
        """
        stored, next_stored = (
            self.state[..., POSITION_PLUS_ONE],
            (positions + 1)[:, None, None].to(self.state),
        )
        recent = self.eviction.protect_recent if recent is None else recent
        evictable = (stored <= next_stored - recent) & (stored > self.eviction.protect_first)
        priorities = torch.where(evictable, self.state[..., SCORE], -NEVER)
        if self.window is not None:
            priorities = torch.where(
                stored <= next_stored - self.window, (LATEST - stored) * UNSEEN, priorities
            )
        return torch.where(stored == next_stored, NEVER, priorities)

    def make_room(self, count: int, positions: Tensor) -> None:
        """Evict tokens until `count` more fit; the last remaining ones move to the free slots.

        Args:
            count: number of new tokens.
            positions: positions of the first new token [B].
        """
        for row in range(len(self.filled)):
            self.shrink(row, self.slots - count, positions)

    def compressed(self, positions: Tensor) -> EvictingCache:
        """A copy with as many slots as the budget.

        All other tokens are evicted at once, as arXiv 2406.11430 does.

        Args:
            positions: positions of the next token [B].
        """
        copy = replace(
            self, **{name: getattr(self, name).clone() for name in ("key", "value", "state", "filled")}
        )
        budget = min(self.eviction.budget, self.slots)
        for row in range(len(self.filled)):
            copy.shrink(row, budget, positions)
        copy.key, copy.value, copy.state = (
            each[:, :, :budget] for each in (copy.key, copy.value, copy.state)
        )
        return copy

    def shrink(self, row: int, keep: int, positions: Tensor) -> None:
        """Evict tokens of a row until at most `keep` remain."""
        filled = int(self.filled[row])
        if filled <= keep:
            return
        recent = max(0, min(self.eviction.protect_recent, keep - self.eviction.protect_first))
        ranked = self.priorities(positions, recent)[row, :, :filled].argsort(
            dim=-1, descending=True, stable=True
        )
        evicted = torch.zeros(ranked.shape, dtype=torch.bool).scatter(1, ranked[:, : filled - keep], True)
        slots = torch.arange(filled).expand_as(ranked)
        remaining = slots[:, :keep].clone()
        # In every head, as many tokens are evicted in front of slot `keep` as remain behind it.
        remaining[evicted[:, :keep]] = slots[:, keep:][~evicted[:, keep:]]
        for buffer in (self.key, self.value, self.state):
            index = remaining[..., None].expand(-1, -1, buffer.shape[-1])
            buffer[row, :, :keep] = buffer[row].gather(1, index)
        self.state[row, :, keep:] = 0
        self.filled[row] = keep
