"""Sampling: the choice of the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvexport.errors import BundleError, UsageError

_FIRST = 1024  # most likely tokens that are sorted first; enough for most values of top_p


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    Attributes:
        temperature: 0: the most likely token. Above 0: logits are divided by it, and a token is drawn.
        top_k: draw from that many most likely tokens; None: all.
        top_p: draw from the smallest set of most likely tokens whose probability reaches it; None: all.
        seed: makes drawing repeatable; None: draws differ each time.

    Raises (on construction):
        UsageError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value, expected, is_valid in (
            ("temperature", self.temperature, "0 or more, and finite", 0 <= self.temperature < np.inf),
            ("top_k", self.top_k, "an integer >= 1", _is_integer_from(1, self.top_k)),
            ("top_p", self.top_p, "above 0 and at most 1", self.top_p is None or 0 < self.top_p <= 1),
            ("seed", self.seed, "an integer >= 0", _is_integer_from(0, self.seed)),
        ):
            if not is_valid:
                raise UsageError(f"{name} must be {expected}", got=value)

    @classmethod
    def of(
        cls, temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None
    ) -> Sampling:
        """As `Session.generate` takes the arguments: no temperature is 1 with `top_k` or `top_p`, else 0."""
        if temperature is None:
            temperature = 0.0 if top_k is None and top_p is None else 1.0
        return cls(temperature, top_k, top_p, seed)

    def generators(self, rows: int) -> list[np.random.Generator]:
        """One random generator per row, so that what a row draws does not depend on the other rows."""
        return [np.random.default_rng(seed) for seed in np.random.SeedSequence(self.seed).spawn(rows)]

    def choose(self, logits: NDArray[np.float32], generator: np.random.Generator) -> int:
        """The next token for logits [vocab]; of equally likely tokens the first.

        Raises:
            BundleError: a logit is not finite.
        """
        likeliest = int(logits.argmax())
        if not np.isfinite(logits[likeliest]):  # argmax returns a NaN if there is one
            raise BundleError(
                "the model's logits must be finite",
                got=logits[likeliest],
                fix=(
                    "if the bundle's dtype is float16, build it with --dtype float32: "
                    "a value of this model overflows"
                ),
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
            inside = nucleus(weights, self.top_p * weights.sum())
            tokens, weights = tokens[inside], weights[inside]
        return tokens, weights


def is_integer(number: object) -> bool:
    """Whether it is an integer of Python or numpy, and not a boolean."""
    return isinstance(number, (int, np.integer)) and not isinstance(number, bool)


def _is_integer_from(minimum: int, number: int | None) -> bool:
    return number is None or (is_integer(number) and number >= minimum)


def _likeliest(weights: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest weights in descending order; of equal ones the first."""
    least = np.partition(weights, -count)[-count]
    indices = np.flatnonzero(weights >= least)  # more than `count` if some are equal
    return indices[np.argsort(-weights[indices], kind="stable")[:count]]


def nucleus(weights: NDArray[np.float64], mass: float) -> NDArray[np.int64]:
    """Indices of the fewest largest weights that sum to `mass`, in descending order."""
    likeliest = _likeliest(weights, min(_FIRST, len(weights)))  # sorting a large vocabulary is slow
    if weights[likeliest].sum() < mass:
        # All weights of at most this value together are less than what may be left out.
        negligible = (weights.sum() - mass) / len(weights)
        likeliest = _likeliest(weights, max(1, int((weights > negligible).sum())))
    return likeliest[: int(weights[likeliest].cumsum().searchsorted(mass)) + 1]
