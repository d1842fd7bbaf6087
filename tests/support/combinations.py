"""Parameters over several axes: all combinations, of which `make test` runs a few representatives."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import product
from typing import Any

import pytest


def representatives(
    *axes: Sequence[Any], cover: Collection[int] | None = None, without: Collection[tuple[Any, ...]] = ()
) -> list[Any]:
    """All combinations of the axes for `pytest.mark.parametrize`; all but a few are marked exhaustive.

    Args:
        axes: values of each parameter; an axis of tuples stands for several parameters.
        cover: axes whose every value occurs in the few; None: all axes.
        without: combinations that do not exist; an entry lists the first values of a combination.
    """
    combinations = [each for each in product(*axes) if not any(each[: len(gap)] == gap for gap in without)]
    missing = {(axis, value) for axis in cover or range(len(axes)) for value in axes[axis]}
    chosen = set()
    while missing:
        best = max(combinations, key=lambda each: len(missing & set(enumerate(each))))
        chosen.add(best)
        missing -= set(enumerate(best))
    return [
        pytest.param(*_flat(each), marks=[] if each in chosen else [pytest.mark.exhaustive])
        for each in combinations
    ]


def _flat(values: Sequence[Any]) -> list[Any]:
    return [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
