"""How a cache stays within a budget of tokens, as plain data that every part shares: which tokens go first, which never.

Knows names, ranges and numbers that conversion, graph and runtime must agree on, and imports nothing heavy; must not know how
a slot is chosen or written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvexport.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

POLICIES = {
    "l2-norm": "the token whose key has the highest L2 norm (arXiv 2406.11430)",
    "window": "the oldest token: with --protect-first, sinks and a sliding window (arXiv 2309.17453)",
    "keep-high": "the token whose key has the lowest L2 norm",
    "random": "any token",
}
DEFAULT_POLICY, DEFAULT_FIRST = "window", 4
SCORE, POSITION_PLUS_ONE = (
    0,
    1,
)  # columns of a slot's state: what it is ranked by, and the position of its token + 1 (0: empty)
STATE_WIDTH = 2
# Priorities. No score reaches those of tokens that no query sees any more, the earlier the higher; all are exact in float32.
NEVER, UNSEEN, LATEST = 2.0**100, 2.0**60, 2.0**24
# Of a norm, for every position that a token is later: the same token again has the same norm, but for rounding, and without
# this which of them goes would be another in every engine. The older one goes.
LATER = 2.0**-20
MOST_POSITIONS = 2**19  # for which the two hold


@dataclass(frozen=True)
class Eviction:
    """Each KV head holds `budget` tokens; when they are taken, a new one overwrites the one that ranks highest.

    Attributes:
        policy: one of `POLICIES`: which token goes.
        budget: slots of a sequence in every KV head.
        protect_first: positions 0..N-1 never go (attention sinks).
        protect_recent: nor do the N last positions, the newest one counted.
        skip_layers: layers that evict nothing, and hold as many tokens as the capacity.
    """

    policy: str
    budget: int
    protect_first: int = 0
    protect_recent: int = 0
    skip_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UsageError(
                "there is no such policy of eviction", got=self.policy, expected=", ".join(POLICIES)
            )
        for option, count in (
            ("--protect-first", self.protect_first),
            ("--protect-recent", self.protect_recent),
        ):
            if count < 0:
                raise UsageError(f"{option} is out of range", got=count, expected="0 tokens or more")
        if self.budget <= self.protected:
            raise UsageError(
                "--kv-budget leaves no token that may go",
                got=f"{self.budget} tokens",
                expected=f"more than the {self.protected} of --protect-first and of --protect-recent, which counts the newest",
                fix="raise --kv-budget, or lower --protect-first or --protect-recent",
            )

    @property
    def protected(self) -> int:
        """Tokens that may not go."""
        return self.protect_first + max(1, self.protect_recent)

    @property
    def chunk(self) -> int:
        """The most tokens of a prompt that are read at once: room for them is made beforehand, at the cost of older ones."""
        return max(1, (self.budget - self.protect_first) // 4)

    @property
    def self_test_slots(self) -> int:
        """Slots that suffice to show every case of a budget in a short text: proofs run in as many."""
        return min(self.budget, self.protected + 16)

    def evicts(self, layer: int) -> bool:
        return layer not in self.skip_layers

    def slots(self, layer: int, capacity: int) -> int:
        """The most tokens of a sequence that a layer holds."""
        return min(self.budget, capacity) if self.evicts(layer) else capacity

    def require(self, capacity: int, num_layers: int) -> None:
        """
        Raises:
            UsageError: more than the capacity, too many positions, or a layer that is not there, or no layer that evicts.
        """
        if capacity > MOST_POSITIONS:
            raise UsageError(
                "a cache that evicts cannot count as many positions",
                got=capacity,
                expected=f"at most {MOST_POSITIONS}",
                fix=f"--capacity {MOST_POSITIONS}",
            )
        if self.budget > capacity:
            raise UsageError(
                "--kv-budget is larger than the capacity, so that nothing would ever go",
                got=f"{self.budget} tokens",
                expected=f"{self.protected + 1} to {capacity}",
                fix="lower --kv-budget, raise --capacity, or leave it out",
            )
        wrong = [layer for layer in self.skip_layers if not 0 <= layer < num_layers]
        if wrong:
            raise UsageError(
                "--evict-skip-layers names a layer that the model does not have",
                got=wrong[0],
                expected=f"0 to {num_layers - 1}",
            )
        if len(set(self.skip_layers)) == num_layers:
            raise UsageError(
                "--evict-skip-layers names every layer, so that nothing would ever go",
                got=f"{num_layers} layers",
                fix="leave --kv-budget out",
            )

    def __str__(self) -> str:
        """For people: what each KV head holds, and what goes."""
        spared = [
            text
            for count, text in (
                (self.protect_first, f"the first {self.protect_first}"),
                (self.protect_recent, f"the last {self.protect_recent}"),
            )
            if count
        ]
        kept = f", but {' and '.join(spared)} never do" if spared else ""
        named = ", ".join(map(str, self.skip_layers))
        skipped = (
            f"; {f'layer {named} holds' if len(self.skip_layers) == 1 else f'layers {named} hold'} every token"
            if named
            else ""
        )
        return f"{self.budget} tokens in each KV head ({self.policy}{kept}){skipped}"

    def to_json(self) -> dict[str, Any]:
        """As what `json.dumps` takes; `from_json` reads it back."""
        return {**asdict(self), "skip_layers": list(self.skip_layers)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Eviction:
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError: the mapping is not what `to_json` made.
            UsageError: a value is out of range.
        """
        numbers = {name: raw[name] for name in ("budget", "protect_first", "protect_recent")}
        skipped = raw["skip_layers"]
        if (
            not all(type(each) is int for each in (*numbers.values(), *skipped))
            or raw.keys() - cls.__dataclass_fields__.keys()
        ):
            raise TypeError("eviction has values that are not whole numbers, or unknown keys")
        return cls(str(raw["policy"]), **numbers, skip_layers=tuple(skipped))


@dataclass(frozen=True)
class EvictionRequest:
    """What `kvexport build` is asked for; what is None is as measured best (benchmarks/results/eviction.md).

    Attributes:
        budget: tokens, or with `of_capacity` a share of the capacity.
    """

    budget: float
    of_capacity: bool = False
    policy: str | None = None
    protect_first: int | None = None
    protect_recent: int | None = None
    skip_layers: tuple[int, ...] = ()

    @classmethod
    def parse(cls, budget: str, **others: Any) -> EvictionRequest:
        """`budget` as people write it: 256, or 0.5 for half of the capacity.

        Raises:
            UsageError: neither.
        """
        try:
            share = "." in budget
            number = float(budget) if share else int(budget)
            if (share and not 0 < number <= 1) or (number < 1 and not share):
                raise ValueError
        except ValueError:
            raise UsageError(
                "--kv-budget is no number of tokens",
                got=budget,
                expected="a whole number from 1 on, or a share of the capacity from 0.0 to 1.0, such as 0.5",
            ) from None
        return cls(number, share, **others)

    def of(self, capacity: int, num_layers: int) -> Eviction:
        """What that is for a model.

        Raises:
            UsageError: as `Eviction` and its `require`.
        """
        budget = int(self.budget * capacity) if self.of_capacity else int(self.budget)
        policy = self.policy or DEFAULT_POLICY
        first = DEFAULT_FIRST if self.protect_first is None else self.protect_first
        recent = self.protect_recent
        if recent is None:
            recent = 0 if policy == "window" else max(0, (budget - first) // 2)
        eviction = Eviction(policy, budget, first, recent, self.skip_layers)
        eviction.require(capacity, num_layers)
        return eviction


def random_scores(capacity: int) -> NDArray[np.float32]:
    """What the policy "random" gives positions, float32 [2·capacity]: a head takes `capacity` of them from its offset on."""
    import numpy as np

    return np.random.default_rng(0).random(2 * capacity, dtype=np.float32)


def random_offsets(layer: int, heads: int, capacity: int) -> NDArray[np.int64]:
    """Where each head of a layer begins in `random_scores`, int64 [heads]."""
    import numpy as np

    return (np.arange(layer * heads, (layer + 1) * heads, dtype=np.int64) * 7919) % capacity
