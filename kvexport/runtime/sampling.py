"""Choosing the next token from logits; knows probabilities, nothing of models or text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvexport.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily at temperature 0, else drawn, from the `top_k` likeliest and from the smallest
    set whose probability reaches `top_p`.

    Raises (on construction):
        UsageError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value, allowed, passed in (
            ("temperature", self.temperature, "0 or more", self.temperature >= 0),
            ("top_k", self.top_k, "1 or more", self.top_k is None or self.top_k >= 1),
            ("top_p", self.top_p, "above 0, at most 1", self.top_p is None or 0 < self.top_p <= 1),
            ("seed", self.seed, "0 or more", self.seed is None or self.seed >= 0),
        ):
            if not passed:
                raise UsageError(f"{name} is out of range", seen=value, allowed=allowed)

    def generators(self, rows: int) -> list[np.random.Generator]:
        """One source of randomness a row, so that a row draws the same whatever is beside it."""
        seed = np.random.SeedSequence(self.seed)
        return [np.random.default_rng([row, *seed.generate_state(2)]) for row in range(rows)]

    def choose(self, logits: NDArray[np.float32], generator: np.random.Generator) -> int:
        """The next token, given logits [vocab]."""
        if self.temperature == 0:
            return int(logits.argmax())
        scaled = logits.astype(np.float64) / self.temperature
        order = np.argsort(-scaled, kind="stable")[: self.top_k]  # likeliest first
        weights = np.exp(scaled[order] - scaled[order[0]])
        probabilities = weights / weights.sum()
        if self.top_p is not None:
            kept = int(np.searchsorted(np.cumsum(probabilities), self.top_p)) + 1
            order, probabilities = order[:kept], probabilities[:kept] / probabilities[:kept].sum()
        return int(order[generator.choice(len(order), p=probabilities)])
