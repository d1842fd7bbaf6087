"""The verdict: measured arrays against the twin's, array by array, under the gates of the bundle's dtype.

Knows what is compared and how a failure is told; how close is close enough is in `gates`, and where the measured
arrays come from does not matter here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvexport.validate.gates import EXACT, GATES, Difference, Gate, compare, greedy_agreement
from kvexport.validate.reference_run import KINDS
from kvexport.validate.slots import NAMES

Array = NDArray[np.float32]


@dataclass(frozen=True)
class ValidationReport:
    """What was compared, and what failed.

    Attributes:
        dtype: whose gates applied.
        computed_in: the dtype of the arithmetic here; float32 where this machine has no kernels of `dtype`.
        prefill, steps: tokens of the prefill, and single-token steps after it.
        differences: of each layer's key, value, attention and residual, and of the logits.
        greedy_agreement: share of tokens at which bundle and twin choose the same next token.
        failures: a sentence for every gate that failed; empty if the bundle is sound.
        provider: what ran the bundle.
    """

    dtype: str
    computed_in: str
    prefill: int
    steps: int
    gate: Gate
    differences: tuple[Difference, ...]
    greedy_agreement: float
    failures: tuple[str, ...]
    provider: str

    @property
    def compared(self) -> tuple[str, ...]:
        """The kinds of arrays that were compared: an engine shows fewer than a graph."""
        present = {difference.name.split(".")[-1] for difference in self.differences}
        return tuple(kind for kind in (*KINDS, *NAMES, "logits") if kind in present)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as `--json` prints them; a figure that is no number is null."""
        raw = asdict(self) | {"compared": list(self.compared)}
        raw["differences"] = [
            {k: None if v != v else v for k, v in each.items()} for each in raw["differences"]
        ]
        return raw

    def worst(self, kind: str) -> Difference:
        """The least alike of all layers' arrays of one kind, one of `compared`."""
        return min((d for d in self.differences if d.name.split(".")[-1] == kind), key=_likeness)


def judge(
    dtype: str,
    computed_in: str,
    measured: Mapping[str, Array],
    twin: Mapping[str, Array],
    prefill: int,
    provider: str = "cpu",
) -> ValidationReport:
    """Compare measured arrays with the twin's of the same names, under the gates of `dtype`; slots must be the very same.

    Args:
        prefill: tokens that were run at once.
    """
    gate = GATES[dtype]
    names = [name for name in twin if name != "input_ids"]
    differences = tuple(
        compare(name, measured[name], twin[name], EXACT if name.endswith(".slot") else gate) for name in names
    )
    agreement = greedy_agreement(measured["logits"], twin["logits"], gate)
    failures = [
        f"{d.name}: {check} {getattr(d, check):.6g}, allowed {_allowed(EXACT if d.name.endswith('.slot') else gate, check)}"
        for d in differences
        for check in d.failed
    ]
    if agreement < gate.agreement:
        failures.append(f"greedy agreement {agreement:.4f}, allowed at least {gate.agreement}")
    tokens = len(twin["input_ids"])
    return ValidationReport(
        dtype, computed_in, prefill, tokens - prefill, gate, differences, agreement, tuple(failures), provider
    )


def _likeness(difference: Difference) -> float:
    return -math.inf if math.isnan(difference.cosine) else difference.cosine


def _allowed(gate: Gate, check: str) -> str:
    bound = getattr(gate, check)
    return (
        f"1 ± {bound:g}"
        if check == "norm_ratio"
        else f"at {'least' if check == 'cosine' else 'most'} {bound:g}"
    )
