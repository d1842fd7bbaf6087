"""The oracle's cache of a layer that evicts: budgeted slots, each with its score and its token's position.

Knows which token goes and where the next is written, in plain PyTorch; must not know attention. The graph
does the same in operators, the runtime makes room for a prompt's chunks in the same way.
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
    """What each KV head of a layer holds: the tokens of every head are its own.

    Attributes:
        key, value: [B, Hkv, C, key_dim] and [B, Hkv, C, value_dim].
        state: [B, Hkv, C, 2] float32 (float64 where keys are), score and position + 1 of each slot's token; 0
            where it is empty.
        filled: slots in use [B], alike for all heads.
        eviction: what goes first, and what never.
        layer: the layer's index, and `capacity` the positions there are: "random" takes its numbers by them.
        window: of the layer's attention: a token that no query sees any more goes before all others.
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
        """Nothing in it; `slots` of them, or the budget."""
        count, precise = slots or eviction.budget, torch.promote_types(dtype, torch.float32)
        key, value = (torch.zeros(batch, heads, count, width, dtype=dtype) for width in widths)
        state = torch.zeros(batch, heads, count, STATE_WIDTH, dtype=precise)
        return cls(
            key, value, state, torch.zeros(batch, dtype=torch.int64), eviction, layer, capacity, window
        )

    @property
    def slots(self) -> int:
        return self.key.shape[2]

    @property
    def positions(self) -> Tensor:
        """Of the token in each slot, int64 [B, Hkv, C]; -1 where it is empty."""
        return self.state[..., POSITION_PLUS_ONE].long() - 1

    def write(self, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        """Put tokens at consecutive `positions` [B, S] in: key [B, Hkv, S, key_dim], value [B, Hkv, S, value_dim].

        They follow those that are there while there is room. A single token for which there is none takes the
        slot that ranks highest; several first make room for all of them.

        Returns:
            the slots, int64 [B, Hkv, S].
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
        for held, new in ((self.key, key), (self.value, value), (self.state, state.to(self.state))):
            held.scatter_(2, slots[..., None].expand_as(new), new)
        self.filled = (self.filled + count).clamp(max=self.slots)
        return slots

    def scores(self, key: Tensor, positions: Tensor) -> Tensor:
        """What new tokens are ranked by, the highest goes first: [B, Hkv, S]. Of tokens of one norm it is the older one."""
        heads, at = key.shape[1], positions[:, None]
        if self.eviction.policy == "window":
            return -at.expand(-1, heads, -1).to(self.state)
        if self.eviction.policy == "random":
            offsets = torch.from_numpy(random_offsets(self.layer, heads, self.capacity))
            return torch.from_numpy(random_scores(self.capacity)).to(self.state)[at + offsets[:, None]]
        norms, later = key.to(self.state).norm(dim=-1), (at + 1).to(self.state) * LATER
        return norms * (1 - later) if self.eviction.policy == "l2-norm" else -norms * (1 + later)

    def priorities(self, positions: Tensor, recent: int | None = None) -> Tensor:
        """Who goes for tokens at `positions` [B]: the highest of [B, Hkv, C], if all slots are in use.

        A slot of the very same position is written again; a token out of the attention's window goes next.

        Args:
            recent: tokens protected as recent [as many as the policy says], those at `positions` counted.
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
        """Let tokens go before `count` more come at `positions` [B] and after, the highest-ranking first.

        The last ones of those that stay take their slots.
        """
        for row in range(len(self.filled)):
            self._shrink(row, self.slots - count, positions)

    def compressed(self, positions: Tensor) -> EvictingCache:
        """A copy in slots of the budget, before tokens at `positions` [B] come: the paper's way, all that goes at once."""
        kept = replace(
            self, **{name: getattr(self, name).clone() for name in ("key", "value", "state", "filled")}
        )
        budget = min(self.eviction.budget, self.slots)
        for row in range(len(self.filled)):
            kept._shrink(row, budget, positions)
        kept.key, kept.value, kept.state = (
            each[:, :, :budget] for each in (kept.key, kept.value, kept.state)
        )
        return kept

    def _shrink(self, row: int, keep: int, positions: Tensor) -> None:
        """At most `keep` tokens of a row stay."""
        filled = int(self.filled[row])
        if filled <= keep:
            return
        recent = max(0, min(self.eviction.protect_recent, keep - self.eviction.protect_first))
        ranked = self.priorities(positions, recent)[row, :, :filled].argsort(
            dim=-1, descending=True, stable=True
        )
        goes = torch.zeros(ranked.shape, dtype=torch.bool).scatter(1, ranked[:, : filled - keep], True)
        slots = torch.arange(filled).expand_as(ranked)
        kept = slots[:, :keep].clone()
        kept[goes[:, :keep]] = slots[:, keep:][~goes[:, keep:]]  # head by head as many of one as of the other
        for held in (self.key, self.value, self.state):
            held[row, :, :keep] = held[row].gather(1, kept[..., None].expand(-1, -1, held.shape[-1]))
        self.state[row, :, keep:] = 0
        self.filled[row] = keep
