"""Divergence of a compressed model's next-token predictions from the original's, over a stream of logits."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """Means over next-token predictions.

    Attributes:
        mean_kl: KL(original ‖ compressed), nats per token.
        cross_entropy: cross-entropy of the compressed model on the text, nats per token.
        cross_entropy_original: cross-entropy of the original on the text, nats per token.
        top1_agreement: share of predictions in which both models have the same most likely token, 0 to 1.
        tokens: number of predictions.
    """

    mean_kl: float
    cross_entropy: float
    cross_entropy_original: float
    top1_agreement: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the cross-entropy."""
        return math.exp(self.cross_entropy)

    @property
    def perplexity_original(self) -> float:
        """exp of the original's cross-entropy."""
        return math.exp(self.cross_entropy_original)

    def to_json(self) -> dict[str, float | int]:
        """Plain JSON values."""
        return asdict(self) | {"perplexity": self.perplexity, "perplexity_original": self.perplexity_original}


class DivergenceMeter:
    """Accumulates a divergence window by window."""

    def __init__(self) -> None:
        self._kl = self._ce = self._ce_original = self._agree = 0.0
        self._tokens = 0

    def add(self, original: Tensor, compressed: Tensor, windows: Tensor) -> None:
        """Add windows.

        Args:
            original: logits of the original, [N, S, vocab]; position s predicts token s + 1.
            compressed: logits of the compressed model, [N, S, vocab], on any device.
            windows: token ids, [N, S] int64, on any device.
        """
        targets = windows[:, 1:, None].to(original.device)
        a = original[:, :-1].float().log_softmax(-1)
        b = compressed[:, :-1].to(original.device).float().log_softmax(-1)
        self._kl += float((a.exp() * (a - b)).sum(-1).double().sum())
        self._ce -= float(b.gather(-1, targets).double().sum())
        self._ce_original -= float(a.gather(-1, targets).double().sum())
        self._agree += float((a.argmax(-1) == b.argmax(-1)).sum())
        self._tokens += targets.numel()

    def finish(self) -> Divergence:
        """The means over all windows added."""
        count = max(self._tokens, 1)
        return Divergence(
            mean_kl=max(self._kl / count, 0.0),  # rounding can leave -1e-9 for identical models
            cross_entropy=self._ce / count,
            cross_entropy_original=self._ce_original / count,
            top1_agreement=self._agree / count,
            tokens=self._tokens,
        )
