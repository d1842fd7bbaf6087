"""Choosing the next token from logits; knows probabilities, nothing of models or text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvexport.errors import BundleError, UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the likeliest at temperature 0, else drawn from the `top_k` likeliest, and of those from
    the smallest set whose probability reaches `top_p`. Draws are repeatable with a `seed`, fresh each time without.

    Raises (on construction):
        UsageError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value, allowed, passed in (
            ("temperature", self.temperature, "0 or more", 0 <= self.temperature < np.inf),
            ("top_k", self.top_k, "1 or more", self.top_k is None or self.top_k >= 1),
            ("top_p", self.top_p, "above 0, at most 1", self.top_p is None or 0 < self.top_p <= 1),
            ("seed", self.seed, "0 or more", self.seed is None or self.seed >= 0),
        ):
            if not passed:
                raise UsageError(f"{name} is out of range", seen=value, allowed=allowed)

    def generators(self, rows: int) -> list[np.random.Generator]:
        """One source of randomness a row, so that a row draws the same whatever is beside it."""
        return [np.random.default_rng(seed) for seed in np.random.SeedSequence(self.seed).spawn(rows)]

    def choose(self, logits: NDArray[np.float32], generator: np.random.Generator) -> int:
        """The next token, given logits [vocab]; of equally likely ones the first.

        Raises:
            BundleError: a logit is not finite.
        """
        likeliest = int(logits.argmax())
        if not np.isfinite(logits[likeliest]):  # argmax finds a NaN, if there is one
            raise BundleError(
                "the model's logits are not finite", seen=logits[likeliest],
                fix="where the bundle's dtype is float16, build it with --dtype float32: a value of this model overflows",
            )  # fmt: skip
        if self.temperature == 0:
            return likeliest
        tokens, weights = self._candidates(logits.astype(np.float64))
        cumulative = weights.cumsum()
        drawn = int(cumulative.searchsorted(generator.random() * cumulative[-1], side="right"))
        return int(tokens[min(drawn, len(tokens) - 1)])

    def _candidates(self, logits: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The tokens that may be drawn, and their unnormalised probabilities."""
        tokens = np.arange(len(logits))
        if self.top_k is not None and self.top_k < len(tokens):
            least = np.partition(logits, -self.top_k)[-self.top_k]
            tokens = np.flatnonzero(logits >= least)  # more than top_k where some are equal
            tokens = tokens[np.argsort(-logits[tokens], kind="stable")[: self.top_k]]
        weights = np.exp((logits[tokens] - logits.max()) / self.temperature)
        if self.top_p is None or self.top_p == 1:
            return tokens, weights
        total = weights.sum()
        # Tokens that together cannot make up 1 - top_p are outside the set, and need not be sorted.
        likely = np.flatnonzero(weights > (1 - self.top_p) * total / len(weights))
        order = likely[np.argsort(-weights[likely], kind="stable")]
        kept = order[: int(weights[order].cumsum().searchsorted(self.top_p * total)) + 1]
        return tokens[kept], weights[kept]
