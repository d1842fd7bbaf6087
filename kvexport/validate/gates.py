"""Measure the difference of two runs' arrays, and bound it by gates for each dtype."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Gate:
    """Bounds on the difference of an array [T, n] from its reference."""

    cosine: float  # smallest allowed cosine of any token's vector
    norm_ratio: float  # largest allowed |norm / reference norm - 1| of any token's vector
    max_error: float  # largest allowed error of any number, in units of the reference's root mean square
    agreement: float  # smallest allowed share of tokens whose likeliest next token equals the reference's
    tie: float  # logits closer than this in the reference, in units as max_error, count as equal


# Largest differences of valid bundles, measured with ONNX Runtime on a CPU, in float32, float16 and bfloat16,
# each as 1 - cosine, |norm ratio - 1|, max error:
# two trained models, three methods      1e-11, 2e-6, 1e-5    1e-5, 2e-3, 1e-2    8e-5, 7e-3, 3e-2
# 32 layers, initialised, not trained    -                    2e-6, 4e-4, 9e-3    2e-5, 2e-3, 4e-2
# 24 random layers that amplify errors   1e-9, 2e-5, 9e-5     3e-3, 4e-2, 2e-1    6e-2, 3e-1, 1
# The faults of tests/support/damages.py cause 8e-2 or more in cosine and 1 or more in max error, in every
# dtype. The gates lie between. Without a fault only a model of the last kind can fail, in bfloat16, whose
# rounding does change its outputs.
GATES = {
    "float32": Gate(cosine=0.999999, norm_ratio=2e-4, max_error=1e-3, agreement=1.0, tie=1e-3),
    "float16": Gate(cosine=0.99, norm_ratio=0.1, max_error=0.5, agreement=0.95, tie=0.02),
    "bfloat16": Gate(cosine=0.97, norm_ratio=0.15, max_error=0.8, agreement=0.9, tie=0.1),
}

EXACT = Gate(cosine=1 - 1e-9, norm_ratio=1e-9, max_error=0, agreement=1.0, tie=0)  # for integers


@dataclass(frozen=True)
class Difference:
    """The difference of one array from its reference, and the gates that it failed."""

    name: str
    cosine: float
    norm_ratio: float  # of the token whose ratio is farthest from 1
    max_error: float
    failed: tuple[str, ...]


def compare(name: str, measured: Array, reference: Array, gate: Gate) -> Difference:
    """The difference of `measured` [T, n] from `reference` [T, n]; a value that is not finite fails every
    gate."""
    a, b = measured.astype(np.float64), reference.astype(np.float64)
    rms = float(np.sqrt(np.mean(b**2))) or 1.0
    floor = 1e-6 * rms * np.sqrt(b.shape[1])
    norm_a, norm_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    # A vector of almost zero norm has no direction; its error still counts in max_error.
    nonzero = norm_b > floor
    with np.errstate(invalid="ignore", over="ignore"):
        cosines = ((a * b).sum(1) / np.maximum(norm_a * norm_b, floor**2))[nonzero]
        ratios = (norm_a / np.maximum(norm_b, floor))[nonzero]
        errors = np.abs(a - b) / rms
    cosine = float(cosines.min()) if len(cosines) else 1.0
    ratio = float(ratios[np.abs(ratios - 1).argmax()]) if len(ratios) else 1.0
    error = float(errors.max())
    checks = {
        "cosine": cosine >= gate.cosine,
        "norm_ratio": abs(ratio - 1) <= gate.norm_ratio,
        "max_error": error <= gate.max_error,
    }
    return Difference(
        name, cosine, ratio, error, tuple(check for check, passed in checks.items() if not passed)
    )


def greedy_agreement(measured: Array, reference: Array, gate: Gate) -> float:
    """Share of tokens at which the likeliest next token of `measured` [T, vocab] is the reference's.

    A choice whose logit ties with the largest in the reference agrees; a token with a logit that is not
    finite does not.
    """
    slack = gate.tie * float(np.sqrt(np.mean(reference.astype(np.float64) ** 2)))
    chosen = np.take_along_axis(reference, measured.argmax(1)[:, None], axis=1)[:, 0]
    agrees = (chosen >= reference.max(1) - slack) & np.isfinite(measured).all(1)
    return float(np.mean(agrees))
