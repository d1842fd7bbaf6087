"""Partition of a layer's KV heads into groups of one size with the least total loss.

Pairs are matched exactly (minimum-weight perfect matching). Groups of 2n heads start as exactly matched pairs
of groups of n, other sizes grow greedily; simulated annealing then swaps heads between groups. Deterministic.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

Group = tuple[int, ...]
Loss = Callable[[Group], float]  # loss of a group; its heads are in ascending order

PROPOSALS = 256  # swaps proposed
_TEMPERATURE = 0.02  # initial temperature, as a share of the total loss


def match_heads(heads: int, size: int, loss: Loss, proposals: int = PROPOSALS) -> list[Group]:
    """Partition `heads` heads into groups of `size` so that the sum of their losses is small.

    The sum is the least possible for pairs; for larger groups it is never above that of adjacent heads.

    Args:
        heads: number of heads; a multiple of `size`.
        size: heads per group.
        loss: loss of one group.
        proposals: number of swaps that are proposed.

    Returns:
        The groups in ascending order, each of them ascending.
    """
    if size == 1 or size == heads:
        return [tuple(range(start, start + size)) for start in range(0, heads, size)]
    losses = _LossCache(loss)
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

    def __init__(self, loss: Loss) -> None:
        self._loss, self._losses = loss, dict[Group, float]()

    def __call__(self, heads: Sequence[int]) -> float:
        group = tuple(sorted(heads))
        if group not in self._losses:
            self._losses[group] = self._loss(group)
        return self._losses[group]

    def total(self, groups: Sequence[Group]) -> float:
        return sum(map(self, groups))


def _match_pairs(heads: int, size: int, loss: _LossCache) -> list[Group]:
    """Match heads into pairs, pairs into groups of four, and so on; each step is exact."""
    import networkx

    groups: list[Group] = [(head,) for head in range(heads)]
    while len(groups[0]) < size:
        graph = networkx.Graph()
        for i, one in enumerate(groups):
            for j in range(i):
                graph.add_edge(i, j, weight=loss(one + groups[j]))
        groups = sorted(tuple(sorted(groups[i] + groups[j])) for i, j in networkx.min_weight_matching(graph))
    return groups


def _grow_groups(heads: int, size: int, loss: _LossCache) -> list[Group]:
    """Start each group from the first remaining head and add the head that increases its loss least."""
    left, groups = list(range(heads)), []
    while left:
        group = [left.pop(0)]
        while len(group) < size:
            best = min(left, key=lambda head: loss([*group, head]))
            left.remove(best)
            group.append(best)
        groups.append(tuple(sorted(group)))
    return groups


def _anneal(groups: list[Group], loss: _LossCache, proposals: int) -> list[Group]:
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
        increase = loss.total((swapped[a], swapped[b])) - loss.total((now[a], now[b]))
        temperature = _TEMPERATURE * loss.total(now) * (1 - proposal / proposals)
        if increase < 0 or (temperature > 0 and chance.random() < math.exp(-increase / temperature)):
            now = swapped
            best = min(best, now, key=loss.total)
    return best
