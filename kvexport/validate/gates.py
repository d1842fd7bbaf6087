"""How close is close enough: differences between two runs, and the gates for each dtype.

Knows arrays and thresholds; nothing of where the arrays come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Gate:
    """Bounds on the difference of an array [T, n] from its reference."""

    cosine: float  # least cosine of any token's vector
    norm_ratio: float  # largest |norm / reference norm - 1| of any token's vector
    max_error: float  # largest error of any number, in units of the reference's root mean square
    agreement: float  # least share of tokens whose likeliest next token is the reference's


# About ten times what sound bundles of the families show (benchmarks/results/validation.md), and a hundredth of what
# the tests' broken ones do.
GATES = {
    "float32": Gate(cosine=0.99999, norm_ratio=1e-3, max_error=5e-3, agreement=1.0),
    "float16": Gate(cosine=0.999, norm_ratio=2e-2, max_error=0.25, agreement=0.97),
    "bfloat16": Gate(cosine=0.99, norm_ratio=8e-2, max_error=1.0, agreement=0.9),
}


@dataclass(frozen=True)
class Difference:
    """One compared array, its figures and the gates that it failed."""

    name: str
    cosine: float
    norm_ratio: float  # of the token whose ratio is farthest from 1
    max_error: float
    failed: tuple[str, ...]


def compare(name: str, measured: Array, reference: Array, gate: Gate) -> Difference:
    """The difference of `measured` [T, n] from `reference` [T, n]; anything not finite fails every gate."""
    a, b = measured.astype(np.float64), reference.astype(np.float64)
    rms = float(np.sqrt(np.mean(b**2))) or 1.0
    floor = 1e-6 * rms * np.sqrt(b.shape[1])
    norm_a, norm_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    # A token whose reference is all but zero has no direction: its error still counts in max_error.
    speaks = norm_b > floor
    with np.errstate(invalid="ignore", over="ignore"):
        cosines = ((a * b).sum(1) / np.maximum(norm_a * norm_b, floor**2))[speaks]
        ratios = (norm_a / np.maximum(norm_b, floor))[speaks]
        errors = np.abs(a - b) / rms
    cosine = float(cosines.min()) if len(cosines) else 1.0
    ratio = float(ratios[np.abs(ratios - 1).argmax()]) if len(ratios) else 1.0
    error = float(errors.max())
    checks = {
        "cosine": cosine >= gate.cosine,
        "norm_ratio": abs(ratio - 1) <= gate.norm_ratio,
        "max_error": error <= gate.max_error,
    }
    return Difference(name, cosine, ratio, error, tuple(check for check, passed in checks.items() if not passed))


def greedy_agreement(measured: Array, reference: Array, gate: Gate) -> float:
    """Share of tokens at which the likeliest next token of `measured` [T, vocab] is the reference's.

    A near tie is no disagreement: a choice counts as agreed if the reference rates it within the gate's
    max_error of its own best.
    """
    slack = gate.max_error * float(np.sqrt(np.mean(reference.astype(np.float64) ** 2)))
    chosen = np.take_along_axis(reference, measured.argmax(1)[:, None], axis=1)[:, 0]
    return float(np.mean(chosen >= reference.max(1) - slack))
