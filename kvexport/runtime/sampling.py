"""Choosing the next token from logits; knows probabilities, nothing of models or text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvexport.errors import BundleError, UsageError

_FIRST = 1024  # tokens that are looked at first where a probability must be reached


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the likeliest at temperature 0, else drawn from the `top_k` likeliest, and of those from
    the smallest set whose probability reaches `top_p`. Draws are repeatable with a `seed`, fresh each time
    without.

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
            (
                "top_k",
                self.top_k,
                "a whole number, 1 or more",
                self.top_k is None or (is_whole(self.top_k) and self.top_k >= 1),
            ),
            ("top_p", self.top_p, "above 0, at most 1", self.top_p is None or 0 < self.top_p <= 1),
            (
                "seed",
                self.seed,
                "a whole number, 0 or more",
                self.seed is None or (is_whole(self.seed) and self.seed >= 0),
            ),
        ):
            if not passed:
                raise UsageError(f"{name} is out of range", got=value, expected=allowed)

    @classmethod
    def of(
        cls, temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None
    ) -> Sampling:
        """As `Session.generate` takes the arguments: a temperature of None is 1 with `top_k` or `top_p`, else 0."""
        if temperature is None:
            temperature = 0.0 if top_k is None and top_p is None else 1.0
        return cls(temperature, top_k, top_p, seed)

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
                "the model's logits are not finite",
                got=logits[likeliest],
                fix="where the bundle's dtype is float16, build it with --dtype float32: a value of this model overflows",
            )
        if self.temperature == 0:
            return likeliest
        tokens, weights = self._candidates(logits.astype(np.float64))
        cumulative = weights.cumsum()
        drawn = int(cumulative.searchsorted(generator.random() * cumulative[-1], side="right"))
        return int(tokens[min(drawn, len(tokens) - 1)])

    def _candidates(self, logits: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The tokens that may be drawn, and their unnormalised probabilities."""
        weights = np.exp((logits - logits.max()) / self.temperature)
        tokens = np.arange(len(weights))
        if self.top_k is not None and self.top_k < len(weights):
            tokens = _likeliest(weights, self.top_k)
            weights = weights[tokens]
        if self.top_p is not None and self.top_p < 1:
            kept = _nucleus(weights, self.top_p * weights.sum())
            tokens, weights = tokens[kept], weights[kept]
        return tokens, weights


def is_whole(number: object) -> bool:
    """Whether it is an integer, Python's or numpy's, and no truth value."""
    return isinstance(number, (int, np.integer)) and not isinstance(number, bool)


def _likeliest(weights: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest weights, the largest first; of equal ones the first."""
    least = np.partition(weights, -count)[-count]
    found = np.flatnonzero(weights >= least)  # more than `count` where some are equal
    return found[np.argsort(-weights[found], kind="stable")[:count]]


def _nucleus(weights: NDArray[np.float64], mass: float) -> NDArray[np.int64]:
    """Indices of the fewest largest weights that sum to `mass`, the largest first."""
    likeliest = _likeliest(
        weights, min(_FIRST, len(weights))
    )  # most often enough: a large vocabulary is slow to sort
    if weights[likeliest].sum() < mass:
        negligible = (weights.sum() - mass) / len(
            weights
        )  # all that weigh no more than this make up less than the rest
        likeliest = _likeliest(weights, max(1, int((weights > negligible).sum())))
    return likeliest[: int(weights[likeliest].cumsum().searchsorted(mass)) + 1]
