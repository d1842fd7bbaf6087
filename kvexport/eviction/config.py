"""Eviction policies as data: which tokens of a cache with a token budget are evicted first, and which never.

Shared by conversion, graph and runtime, which must use the same constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from kvexport.errors import UsageError
from kvexport.files.schema import Table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

POLICIES = {
    "l2-norm": "the token whose key has the highest L2 norm (arXiv 2406.11430)",
    "window": "the oldest token: with --protect-first, sinks and a sliding window (arXiv 2309.17453)",
    "keep-high": "the token whose key has the lowest L2 norm",
    "random": "any token",
}
BASELINE_POLICIES = ("keep-high", "random")  # selectable for comparison
DEFAULT_POLICY, DEFAULT_FIRST = "window", 4
SCORE, POSITION_PLUS_ONE = 0, 1  # columns of a slot's state; a position + 1 of 0 marks an empty slot
STATE_WIDTH = 2
# Priorities, all exact in float32. NEVER: above every score; its negative is a protected token. UNSEEN: of a
# token that no query attends to any more, multiplied by LATEST - position - 1, so that the earliest goes
# first.
NEVER, UNSEEN, LATEST = 2.0**100, 2.0**60, 2.0**24
# The share of a norm by which it is changed for every position that a token is later. Equal tokens have equal
# norms up to rounding; without this term, which of them is evicted would depend on the engine. Now it is the
# older one.
LATER = 2.0**-20
MAX_POSITIONS = 2**19  # positions for which these constants are exact


@dataclass(frozen=True)
class Eviction:
    """A token budget: each KV head holds at most `budget` tokens.

    A new one then replaces the one of highest priority.

    Attributes:
        policy: one of `POLICIES`: which token is evicted.
        budget: slots of a sequence in every KV head.
        protect_first: the first positions that are never evicted (attention sinks).
        protect_recent: the last positions that are never evicted, the newest one included.
        skip_layers: layers that do not evict; they hold every token, or their sliding window.

    Raises (on construction):
        UsageError: a value is out of range.
    """

    policy: str
    budget: int
    protect_first: int = 0
    protect_recent: int = 0
    skip_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UsageError("--evict must be a known policy", got=self.policy, expected=", ".join(POLICIES))
        for option, count in (
            ("--protect-first", self.protect_first),
            ("--protect-recent", self.protect_recent),
        ):
            if count < 0:
                raise UsageError(f"{option} must be at least 0 tokens", got=count)
        if self.budget <= self.protected:
            raise UsageError(
                "--kv-budget must leave a token that can be evicted",
                got=f"{self.budget} tokens",
                expected=f"more than the {self.protected} that --protect-first and --protect-recent protect",
                fix="raise --kv-budget, or lower --protect-first or --protect-recent",
            )

    @property
    def protected(self) -> int:
        """Number of tokens that are never evicted; the newest one always counts."""
        return self.protect_first + max(1, self.protect_recent)

    @property
    def chunk(self) -> int:
        """The largest number of prompt tokens per call.

        Room for them is made before the call, by evicting older ones.
        """
        return max(1, (self.budget - self.protect_first) // 4)

    @property
    def self_test_slots(self) -> int:
        """Slots in which a short text shows every case of eviction.

        Self-tests and validation use that many.
        """
        return min(self.budget, self.protected + 16)

    def evicts(self, layer: int) -> bool:
        """Whether a layer has the budget."""
        return layer not in self.skip_layers

    def slots(self, layer: int, capacity: int) -> int:
        """The largest number of tokens of a sequence that a layer holds."""
        return min(self.budget, capacity) if self.evicts(layer) else capacity

    def require(self, capacity: int, num_layers: int) -> None:
        """Check against a model.

        Raises:
            UsageError: the budget exceeds the capacity, the capacity exceeds `MAX_POSITIONS`, a skipped layer
                does not exist, or no layer evicts.
        """
        if capacity > MAX_POSITIONS:
            raise UsageError(
                f"--capacity must be at most {MAX_POSITIONS} with --kv-budget",
                got=capacity,
                fix=f"--capacity {MAX_POSITIONS}",
            )
        if self.budget > capacity:
            raise UsageError(
                "--kv-budget must be at most the capacity",
                got=f"{self.budget} tokens",
                expected=f"{self.protected + 1} to {capacity}",
                fix="lower --kv-budget, raise --capacity, or leave --kv-budget out",
            )
        wrong = [layer for layer in self.skip_layers if not 0 <= layer < num_layers]
        if wrong:
            raise UsageError(
                "--evict-skip-layers must name layers of the model",
                got=wrong[0],
                expected=f"0 to {num_layers - 1}",
            )
        if len(set(self.skip_layers)) == num_layers:
            raise UsageError(
                "--evict-skip-layers must leave a layer that evicts",
                got=f"{num_layers} layers",
                fix="leave --kv-budget out",
            )

    def outside_windows(self, windows: Sequence[int | None]) -> Eviction | None:
        """The same without the layers whose sliding window is at most the budget; None if no layer is left.

        Such a layer holds its window and the tokens of one call without loss. With the budget it would lose
        tokens that are still attended to, because room for the tokens of a call is made before the call.

        Args:
            windows: sliding window of each layer in tokens; None: full attention.
        """
        held = {layer for layer, window in enumerate(windows) if window is not None and window <= self.budget}
        if not held:
            return self
        skipped = tuple(sorted(held.union(self.skip_layers)))
        return None if len(skipped) == len(windows) else replace(self, skip_layers=skipped)

    def __str__(self) -> str:
        """A phrase for reports: what each KV head holds and what is evicted."""
        protected = [
            text
            for count, text in (
                (self.protect_first, f"the first {self.protect_first}"),
                (self.protect_recent, f"the last {self.protect_recent}"),
            )
            if count
        ]
        never = f"; never {' or '.join(protected)}" if protected else ""
        layers = ", ".join(map(str, self.skip_layers))
        skipped = ""
        if layers:
            skipped = "; layer " if len(self.skip_layers) == 1 else "; layers "
            skipped += f"{layers} {'does' if len(self.skip_layers) == 1 else 'do'} not evict"
        return f"{self.budget} tokens in each KV head ({self.policy}{never}){skipped}"

    def to_json(self) -> dict[str, Any]:
        """Values for `json.dumps`; `from_table` reads them back."""
        return {**asdict(self), "skip_layers": list(self.skip_layers)}

    @classmethod
    def from_table(cls, table: Table) -> Eviction:
        """The inverse of `to_json`.

        Raises:
            KvexportError: the table's error class: a key is missing, unknown or of another type.
            UsageError: a value is out of range.
        """
        eviction = cls(
            table.string("policy"),
            table.integer("budget"),
            table.integer("protect_first"),
            table.integer("protect_recent"),
            table.integers("skip_layers"),
        )
        table.only()
        return eviction


@dataclass(frozen=True)
class EvictionRequest:
    """The eviction options of `kvexport build`. None: the default, chosen by benchmarks/results/eviction.md.

    Attributes:
        budget: in tokens, or with `of_capacity` as a fraction of the capacity.
        of_capacity: see `budget`.
        policy, protect_first, protect_recent, skip_layers: as in `Eviction`.
    """

    budget: float
    of_capacity: bool = False
    policy: str | None = None
    protect_first: int | None = None
    protect_recent: int | None = None
    skip_layers: tuple[int, ...] = ()

    @classmethod
    def parse(cls, budget: str, **others: Any) -> EvictionRequest:
        """Parse the value of --kv-budget: 256, or 0.5 for half of the capacity.

        Raises:
            UsageError: it is neither.
        """
        try:
            is_fraction = "." in budget
            number = float(budget) if is_fraction else int(budget)
            if (is_fraction and not 0 < number <= 1) or (number < 1 and not is_fraction):
                raise ValueError
        except ValueError:
            raise UsageError(
                "--kv-budget must be an integer >= 1 or a fraction in (0, 1]",
                got=budget,
                fix="give a number of tokens, or a fraction of the capacity with a point, such as 0.5",
            ) from None
        return cls(number, is_fraction, **others)

    def of(self, capacity: int, num_layers: int) -> Eviction:
        """The eviction of a model of this capacity and number of layers.

        Raises:
            UsageError: as `Eviction` and `Eviction.require`.
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
    """Scores of the policy "random", float32 [2·capacity].

    A head uses `capacity` of them from its offset on.
    """
    import numpy as np

    return np.random.default_rng(0).random(2 * capacity, dtype=np.float32)


def random_offsets(layer: int, heads: int, capacity: int) -> NDArray[np.int64]:
    """The offset of each head of a layer in `random_scores`, int64 [heads]."""
    import numpy as np

    return (np.arange(layer * heads, (layer + 1) * heads, dtype=np.int64) * 7919) % capacity
