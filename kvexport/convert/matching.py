"""Which heads should share one: a partition into groups of one size with the least loss, found from a loss alone.

Pairs are matched exactly. A group of 2n heads is first a matched pair of groups of n, other sizes grow greedily; then
heads change places while that helps, and at first sometimes where it does not (annealing). Knows partitions; must not
know what a loss is of.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

Group = tuple[int, ...]
Loss = Callable[[Group], float]  # of a group's heads, in ascending order

_PROPOSALS = 256  # swaps that are tried
_WARM = 0.02  # of the loss at the start: how much worse a swap may first be and still be likely taken


def match_heads(heads: int, size: int, loss: Loss) -> list[Group]:
    """The partition of `heads` heads into groups of `size` whose losses have the least sum found.

    Exact for pairs. `size` must divide `heads`. Deterministic.
    """
    if size == 1 or size == heads:
        return [tuple(range(start, start + size)) for start in range(0, heads, size)]
    known = _Known(loss)
    adjacent = [tuple(range(start, start + size)) for start in range(0, heads, size)]
    found = _doubled(heads, size, known) if size & (size - 1) == 0 else _grown(heads, size, known)
    if size > 2:
        found = min(_annealed(found, known), adjacent, key=known.total)
    return sorted(found)


def order_of(groups: Sequence[Group]) -> list[int]:
    """The heads, group after group."""
    return [head for group in groups for head in group]


class _Known:
    """Losses, each computed once."""

    def __init__(self, loss: Loss) -> None:
        self._loss, self._found = loss, dict[Group, float]()

    def __call__(self, heads: Sequence[int]) -> float:
        group = tuple(sorted(heads))
        if group not in self._found:
            self._found[group] = self._loss(group)
        return self._found[group]

    def total(self, groups: Sequence[Group]) -> float:
        return sum(map(self, groups))


def _doubled(heads: int, size: int, loss: _Known) -> list[Group]:
    """Pairs, pairs of pairs, and so on, each matched exactly."""
    import networkx

    groups: list[Group] = [(head,) for head in range(heads)]
    while len(groups[0]) < size:
        graph = networkx.Graph()
        for i, one in enumerate(groups):
            for j in range(i):
                graph.add_edge(i, j, weight=loss(one + groups[j]))
        groups = sorted(tuple(sorted(groups[i] + groups[j])) for i, j in networkx.min_weight_matching(graph))
    return groups


def _grown(heads: int, size: int, loss: _Known) -> list[Group]:
    """Group after group, each from the first head left, by the head that adds the least loss."""
    left, groups = list(range(heads)), []
    while left:
        group = [left.pop(0)]
        while len(group) < size:
            best = min(left, key=lambda head: loss([*group, head]))
            left.remove(best)
            group.append(best)
        groups.append(tuple(sorted(group)))
    return groups


def _annealed(groups: list[Group], loss: _Known) -> list[Group]:
    """Swaps of two heads between two groups, taken if better, and with a chance that cools to nothing if worse."""
    chance = random.Random(0)
    best = now = groups
    for proposal in range(_PROPOSALS):
        a, b = chance.sample(range(len(now)), 2)
        i, j = chance.choice(now[a]), chance.choice(now[b])
        swapped = list(now)
        swapped[a] = tuple(sorted({*now[a], j} - {i}))
        swapped[b] = tuple(sorted({*now[b], i} - {j}))
        worse = loss.total((swapped[a], swapped[b])) - loss.total((now[a], now[b]))
        warmth = _WARM * loss.total(now) * (1 - proposal / _PROPOSALS)
        if worse < 0 or (warmth > 0 and chance.random() < math.exp(-worse / warmth)):
            now = swapped
            best = min(best, now, key=loss.total)
    return best
