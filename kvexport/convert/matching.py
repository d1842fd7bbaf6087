"""Partition of a layer's KV heads into groups of one size with the least total loss.

Pairs are matched exactly (minimum-weight perfect matching). Groups of 2n heads start as exactly matched pairs
of groups of n, other sizes grow greedily; simulated annealing then swaps heads between groups. Deterministic.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

Group = tuple[int, ...]
# losses of groups of one size; the heads of each are in ascending order
Losses = Callable[[Sequence[Group]], Sequence[float]]

PROPOSALS = 256  # swaps proposed
_TEMPERATURE = 0.02  # initial temperature, as a share of the total loss


def match_heads(heads: int, size: int, losses_of: Losses, proposals: int = PROPOSALS) -> list[Group]:
    """Partition `heads` heads into groups of `size` so that the sum of their losses is small.

    The sum is the least possible for pairs; for larger groups it is never above that of adjacent heads.

    Args:
        heads: number of heads; a multiple of `size`.
        size: heads per group.
        losses_of: losses of groups.
        proposals: number of swaps that are proposed.

    Returns:
        The groups in ascending order, each of them ascending.
    """
    if size == 1 or size == heads:
        return [tuple(range(start, start + size)) for start in range(0, heads, size)]
    losses = _LossCache(losses_of)
    adjacent = [tuple(range(start, start + size)) for start in range(0, heads, size)]
    groups = (
        _match_pairs(heads, size, losses) if size & (size - 1) == 0 else _grow_groups(heads, size, losses)
    )
    if size > 2:
        groups = min(_anneal(groups, losses, proposals), adjacent, key=losses.total)
    return sorted(groups)


def order_of(groups: Sequence[Group]) -> list[int]:
    """The heads in the order of their groups."""
    return [head for group in groups for head in group]


class _LossCache:
    """Losses of groups, each computed once."""

    def __init__(self, losses_of: Losses) -> None:
        self._losses_of, self._losses = losses_of, dict[Group, float]()

    def __call__(self, groups: Sequence[Sequence[int]]) -> list[float]:
        ascending = [tuple(sorted(group)) for group in groups]
        missing = [group for group in dict.fromkeys(ascending) if group not in self._losses]
        if missing:
            self._losses.update(zip(missing, self._losses_of(missing), strict=True))
        return [self._losses[group] for group in ascending]

    def total(self, groups: Sequence[Group]) -> float:
        return sum(self(groups))


def _match_pairs(heads: int, size: int, losses: _LossCache) -> list[Group]:
    """Match heads into pairs, pairs into groups of four, and so on; each step is exact."""
    import networkx

    groups: list[Group] = [(head,) for head in range(heads)]
    while len(groups[0]) < size:
        pairs = [(i, j) for i in range(len(groups)) for j in range(i)]
        graph = networkx.Graph()
        weights = losses([groups[i] + groups[j] for i, j in pairs])
        graph.add_weighted_edges_from((*pair, weight) for pair, weight in zip(pairs, weights, strict=True))
        groups = sorted(tuple(sorted(groups[i] + groups[j])) for i, j in networkx.min_weight_matching(graph))
    return groups


def _grow_groups(heads: int, size: int, losses: _LossCache) -> list[Group]:
    """Start each group from the first remaining head and add the head that increases its loss least."""
    left, groups = list(range(heads)), []
    while left:
        group = [left.pop(0)]
        while len(group) < size:
            grown = losses([[*group, head] for head in left])
            group.append(left.pop(grown.index(min(grown))))
        groups.append(tuple(sorted(group)))
    return groups


def _anneal(groups: list[Group], losses: _LossCache, proposals: int) -> list[Group]:
    """Simulated annealing over swaps of two heads between two groups, with a fixed seed; returns the best
    partition.
    """
    chance = random.Random(0)
    best = now = groups
    for proposal in range(proposals):
        a, b = chance.sample(range(len(now)), 2)
        i, j = chance.choice(now[a]), chance.choice(now[b])
        swapped = list(now)
        swapped[a] = tuple(sorted({*now[a], j} - {i}))
        swapped[b] = tuple(sorted({*now[b], i} - {j}))
        increase = losses.total((swapped[a], swapped[b])) - losses.total((now[a], now[b]))
        temperature = _TEMPERATURE * losses.total(now) * (1 - proposal / proposals)
        if increase < 0 or (temperature > 0 and chance.random() < math.exp(-increase / temperature)):
            now = swapped
            best = min(best, now, key=losses.total)
    return best
