"""Options and report of healing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvexport.errors import UsageError
from kvexport.model.decoder import Decoder


@dataclass(frozen=True)
class HealOptions:
    """Options of healing.

    Attributes:
        steps: optimizer steps; the first four fifths for each layer alone, the rest for all layers together.
        seed: random seed of the order of windows and of the adapters' initial weights.
        lora_rank: rank of LoRA adapters (arXiv 2106.09685) trained on q, k, v and o; None: train the weights.
        batch: windows per step.
        learning_rate: largest step of Adam relative to the RMS of the tensor; a tenth of it in the second
            phase.

    Raises (on construction):
        UsageError: a value is out of range.
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


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise UsageError(f"the {name} of healing must be {expected}", got=value)


@dataclass(frozen=True)
class HealReport:
    """Result of healing in numbers.

    Attributes:
        steps: steps run, both phases; fewer than requested after an early stop.
        best_step: step whose weights were kept; 0: the given weights.
        kl_before: mean KL(original ‖ converted) on the held-out windows before healing, nats per token.
        kl_after: the same after healing.
        curve: (step, held-out KL) of every evaluation; step 0 is the given model.
        trained_numbers: numbers that the optimizer trained.
        seconds: wall time, over all runs if it was resumed.
    """

    steps: int
    best_step: int
    kl_before: float
    kl_after: float
    curve: tuple[tuple[int, float], ...]
    trained_numbers: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"curve": [list(point) for point in self.curve]}


@dataclass(frozen=True)
class HealResult:
    """The healed decoder, with the dtypes and shapes of the given one, and the report.

    Attributes:
        decoder: the given decoder itself if no weights were better.
        report: what healing changed.
    """

    decoder: Decoder
    report: HealReport
