"""Compare measured arrays with the reference's, one by one, under the gates of the bundle's dtype."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvexport.validate.gates import EXACT, GATES, Difference, Gate, compare, greedy_agreement
from kvexport.validate.reference_run import KINDS
from kvexport.validate.reference_slots import SLOT_ARRAYS
from kvexport.validate.rounding import PredictionDifference

Array = NDArray[np.float32]


@dataclass(frozen=True)
class ValidationReport:
    """The result of a validation. The field names are keys of report.json and of `--json`.

    Attributes:
        dtype: the bundle's dtype, which decides the gates.
        computed_in: the dtype of the arithmetic; float32 if this machine has no kernels of `dtype`.
        prefill, steps: tokens of the prefill, and single-token steps after it.
        gate: the gates of `dtype`.
        differences: one for each layer's key, value, attention and residual, and one for the logits.
        greedy_agreement: share of tokens at which bundle and reference choose the same next token.
        failures: a sentence for every failed gate; empty if the bundle is valid.
        provider: the provider that ran the bundle.
        int8_activations: what a session on this provider loses more, because ONNX Runtime's CPU rounds
            activations to int8 in linear maps with integer weights; None: it does not, or was not measured.
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
    int8_activations: PredictionDifference | None = None

    @property
    def compared(self) -> tuple[str, ...]:
        """The kinds of arrays that were compared; an engine gives fewer than a graph."""
        present = {difference.name.split(".")[-1] for difference in self.differences}
        return tuple(kind for kind in (*KINDS, *SLOT_ARRAYS, "logits") if kind in present)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values; NaN becomes null."""
        raw = asdict(self) | {"compared": list(self.compared)}
        raw["differences"] = [
            {k: None if v != v else v for k, v in each.items()} for each in raw["differences"]
        ]
        return raw

    def worst(self, kind: str) -> Difference:
        """The difference with the smallest cosine among all layers' arrays of one kind of `compared`."""
        return min((d for d in self.differences if d.name.split(".")[-1] == kind), key=_likeness)


def judge(
    dtype: str,
    computed_in: str,
    measured: Mapping[str, Array],
    reference: Mapping[str, Array],
    prefill: int,
    provider: str = "cpu",
) -> ValidationReport:
    """Compare measured arrays with the reference's of the same names, under the gates of `dtype`; slots must
    be equal.

    Args:
        dtype: the bundle's dtype.
        computed_in: the dtype of the arithmetic.
        measured, reference: arrays [T, n] by name; `reference` also has `input_ids` [T].
        prefill: number of tokens that were run at once.
        provider: the provider that ran the bundle.
    """
    gate = GATES[dtype]
    names = [name for name in reference if name != "input_ids"]
    gates = {name: EXACT if name.endswith(".slot") else gate for name in names}
    differences = tuple(compare(name, measured[name], reference[name], gates[name]) for name in names)
    agreement = greedy_agreement(measured["logits"], reference["logits"], gate)
    failures = [
        f"{d.name}: {check} {getattr(d, check):.6g}, allowed {_allowed(gates[d.name], check)}"
        for d in differences
        for check in d.failed
    ]
    if agreement < gate.agreement:
        failures.append(f"greedy agreement {agreement:.4f}, allowed at least {gate.agreement}")
    tokens = len(reference["input_ids"])
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
