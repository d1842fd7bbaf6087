"""Compare the predictions of two runs of a bundle, of which one rounds activations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PredictionDifference:
    """The difference of predictions from those of an exact run, over all tokens.

    Attributes:
        mean_kl: KL(exact ‖ rounded), nats per token.
        top1_agreement: share of tokens with the same most likely next token.
        max_error: largest error of a logit, in units of the root mean square of the exact logits.
    """

    mean_kl: float
    top1_agreement: float
    max_error: float


def compare_predictions(exact: NDArray[np.float32], rounded: NDArray[np.float32]) -> PredictionDifference:
    """The difference of logits [T, vocab] from exact ones."""
    a, b = exact.astype(np.float64), rounded.astype(np.float64)
    log_a, log_b = _log_softmax(a), _log_softmax(b)
    rms = float(np.sqrt(np.mean(a**2))) or 1.0
    return PredictionDifference(
        mean_kl=max(0.0, float((np.exp(log_a) * (log_a - log_b)).sum(1).mean())),
        top1_agreement=float(np.mean(a.argmax(1) == b.argmax(1))),
        max_error=float(np.abs(a - b).max()) / rms,
    )


def _log_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = x - x.max(1, keepdims=True)
    log: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return log
