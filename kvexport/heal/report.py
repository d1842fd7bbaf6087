"""What healing is asked for and what it says afterwards; knows nothing of how it is done."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvexport.errors import UsageError
from kvexport.model.decoder import Decoder


@dataclass(frozen=True)
class HealOptions:
    """How long and how to heal.

    Attributes:
        steps: optimizer steps; the first four fifths of them layer by layer (so many a layer), the rest end to end.
        seed: of the order of the windows, and of the adapters' initial weights.
        lora_rank: train adapters of this rank on q, k, v and o, in place of the whole weights.
        batch: windows in a step.
        learning_rate: the largest step of Adam, relative to the RMS of the tensor it moves; end to end a tenth of it.

    Raises (on construction):
        UsageError: a value out of range.
    """

    steps: int
    seed: int = 0
    lora_rank: int | None = None
    batch: int = 2
    learning_rate: float = 0.02

    def __post_init__(self) -> None:
        _require("steps", self.steps, self.steps >= 1, "1 or more")
        _require(
            "rank of the adapters", self.lora_rank, self.lora_rank is None or self.lora_rank >= 1, "1 or more"
        )
        _require("batch", self.batch, self.batch >= 1, "1 or more windows")
        _require("learning rate", self.learning_rate, self.learning_rate > 0, "above 0")


def _require(name: str, seen: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise UsageError(f"the {name} of healing cannot be used", got=seen, expected=allowed)


@dataclass(frozen=True)
class HealReport:
    """What healing did.

    Attributes:
        steps: steps run, the layer-wise ones among them; fewer than asked for where it stopped early.
        best_step: the step whose weights were kept; 0: none was better than what was given.
        kl_before, kl_after: mean KL(original ‖ converted) on the held-out windows, nats per token.
        curve: (step, held-out KL) of every evaluation; step 0 is what was given.
        trained_numbers: how many numbers the optimizer moved.
        seconds: wall time, over all runs where it was resumed.
    """

    steps: int
    best_step: int
    kl_before: float
    kl_after: float
    curve: tuple[tuple[int, float], ...]
    trained_numbers: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"curve": [list(point) for point in self.curve]}


@dataclass(frozen=True)
class Healed:
    """The decoder with its attention weights healed, of the dtype and shapes given; the very one given if none was better."""

    decoder: Decoder
    report: HealReport
