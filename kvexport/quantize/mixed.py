"""Choice of the weights that get 8 bits: the least predicted KL within a number of bytes, solved exactly.

A 0/1 knapsack over weights, by dynamic programming over bytes. Bytes are counted in a common divisor of all
sizes; where that would make more than `_STEPS` of them, in the smallest unit that does not, rounded up, so
that the choice stays within the budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvexport.errors import UsageError
from kvexport.quantize.sensitivity import WeightLoss

_STEPS = 20_000


@dataclass(frozen=True)
class MixedBits:
    """Which weights have 8 bits, and what that comes to.

    Attributes:
        eight_bits: keys of the weights that have 8 bits.
        kl: predicted mean KL in nats per prediction, all weights.
        bytes: bytes of codes and scales, all weights.
    """

    eight_bits: frozenset[str]
    kl: float
    bytes: int


class MixedBitsFrontier:
    """Least predicted KL for every number of bytes.

    Attributes:
        fewest: the choice with no more 8 bits than the format needs.
        most: the choice with 8 bits everywhere.
    """

    def __init__(self, losses: Mapping[str, WeightLoss]) -> None:
        """
        Args:
            losses: what each weight costs, by key.

        Raises:
            UsageError: a loss is not finite.
        """
        self._losses = dict(losses)
        for key, each in losses.items():
            if not (math.isfinite(each.kl) and math.isfinite(each.kl_eight)):
                raise UsageError(
                    f"the predicted KL of the weight {key} in integers must be finite",
                    got=f"{each.kl:g}, {each.kl_eight:g} in 8 bits",
                    fix="use --weight-method nearest, --weights int8, or other --calibration text",
                )
        self._extra = {key: each.bytes_eight - each.bytes for key, each in losses.items()}
        self._items = [key for key, extra in self._extra.items() if extra > 0]
        total = sum(self._extra[key] for key in self._items)
        divisor = math.gcd(*(self._extra[key] for key in self._items)) if self._items else 1
        self._unit = max(divisor, -(-total // _STEPS))
        costs = [-(-self._extra[key] // self._unit) for key in self._items]
        size = sum(costs) + 1
        least: NDArray[np.float64] = np.zeros(size)  # KL saved is negative
        self._taken: list[NDArray[np.bool_]] = []
        for key, cost in zip(self._items, costs, strict=True):
            saved = self._losses[key].kl_eight - self._losses[key].kl
            taken = np.zeros(size, bool)
            with_eight = least[: size - cost] + saved
            taken[cost:] = with_eight < least[cost:]
            least = np.concatenate((least[:cost], np.minimum(least[cost:], with_eight)))
            self._taken.append(taken)
        self._least, self._costs = least, costs
        self.fewest = self._choice(0)
        self.most = self._made(frozenset(self._losses))

    def within_bytes(self, most: int) -> MixedBits:
        """The choice of least KL with at most `most` bytes.

        Raises:
            UsageError: even the smallest choice has more.
        """
        if most < self.fewest.bytes:
            raise UsageError(
                "the bytes of the weights must allow the smallest format",
                got=most,
                expected=self.fewest.bytes,
            )
        return self._choice(min((most - self.fewest.bytes) // self._unit, len(self._least) - 1))

    def within_kl(self, most: float) -> MixedBits:
        """The choice of fewest bytes with a predicted KL of at most `most`.

        Raises:
            UsageError: no choice reaches it.
        """
        base = sum(each.kl for each in self._losses.values())
        reached = base + self._least <= most + 1e-12 * base
        if not reached.any():
            raise UsageError(
                "--weight-max-kl must be reachable in 8 bits",
                got=f"{most:g}",
                expected=f"at least {base + self._least[-1]:.3g}",
            )
        return self._choice(int(reached.argmax()))

    def _choice(self, at: int) -> MixedBits:
        chosen = set()
        for key, cost, taken in zip(
            reversed(self._items), reversed(self._costs), reversed(self._taken), strict=True
        ):
            if taken[at]:
                chosen.add(key)
                at -= cost
        return self._made(frozenset(chosen))

    def _made(self, chosen: frozenset[str]) -> MixedBits:
        kl, size = 0.0, 0
        for key, each in self._losses.items():
            kl += each.kl_eight if key in chosen else each.kl
            size += each.bytes_eight if key in chosen else each.bytes
        return MixedBits(chosen, kl, size)
