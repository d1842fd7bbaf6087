"""Choose which heads share a group: greedily by the most similar pairs, or by annealed swaps."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

RESTARTS, SWAPS = 20, 1000


def group_size(heads: int, most: int = 4) -> int:
    """The largest size up to `most` that divides the number of heads."""
    return next(size for size in range(min(most, heads), 0, -1) if heads % size == 0)


def adjacent(heads: int, size: int) -> list[list[int]]:
    return [list(range(at, at + size)) for at in range(0, heads, size)]


def greedy_groups(similarity: Tensor, size: int) -> list[list[int]]:
    """Groups of `size` of a similarity [h, h]: pairs in order of similarity open a group or join one with
    room."""
    heads = len(similarity)
    groups: list[list[int]] = [[] for _ in range(heads // size)]
    home: dict[int, int] = {}
    pairs = [(i, j) for i in range(heads) for j in range(i + 1, heads)]
    for pair in sorted(pairs, key=lambda pair: -float(similarity[pair])):
        known = [home[head] for head in pair if head in home]
        new = [head for head in pair if head not in home]
        wanted = known[:1] if known else range(len(groups))
        place = next((group for group in wanted if len(groups[group]) + len(new) <= size), None)
        if new and place is not None:
            groups[place] += new
            home.update(dict.fromkeys(new, place))
    for head in (head for head in range(heads) if head not in home):
        next(group for group in groups if len(group) < size).append(head)
    return [sorted(group) for group in groups]


def score(similarity: list[list[float]], groups: list[list[int]]) -> float:
    """Sum of similarities within groups."""
    return sum(similarity[i][j] for group in groups for at, i in enumerate(group) for j in group[at + 1 :])


def annealed_groups(similarity: Tensor, size: int, seed: int = 0) -> list[list[int]]:
    """Groups of `size` with a large sum of similarities within them: random swaps between groups, cooling,
    restarts."""
    heads, chance = len(similarity), random.Random(seed)
    best = adjacent(heads, size)
    if size in (1, heads):
        return best
    table = similarity.tolist()
    best_score = score(table, best)
    spread = float(similarity[~torch.eye(heads, dtype=torch.bool)].std()) or 1.0
    for restart in range(RESTARTS):
        order = list(range(heads))
        if restart:
            chance.shuffle(order)
        groups = [order[at : at + size] for at in range(0, heads, size)]
        now = score(table, groups)
        for swap in range(SWAPS):
            (a, b), i, j = (
                chance.sample(range(len(groups)), 2),
                chance.randrange(size),
                chance.randrange(size),
            )
            before = score(table, [groups[a], groups[b]])
            groups[a][i], groups[b][j] = groups[b][j], groups[a][i]
            gain = score(table, [groups[a], groups[b]]) - before
            if gain < 0 and chance.random() >= math.exp(gain / (spread * (1 - swap / SWAPS))):
                groups[a][i], groups[b][j] = groups[b][j], groups[a][i]
                continue
            now += gain
            if now > best_score + 1e-12:
                best, best_score = [list(group) for group in groups], now
    return sorted(sorted(group) for group in best)
