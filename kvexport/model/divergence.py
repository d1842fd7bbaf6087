"""How far one model's next-token predictions are from another's, summed over a stream of logits.

Knows logits and targets; nothing of models.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """Means over `tokens` predictions.

    Attributes:
        mean_kl: KL(original ‖ compressed), nats per token.
        cross_entropy: of the compressed model's predictions against the text, nats per token.
        cross_entropy_original: the original's.
        top1_agreement: how often both models' likeliest token is the same.
        tokens: predictions compared.
    """

    mean_kl: float
    cross_entropy: float
    cross_entropy_original: float
    top1_agreement: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.cross_entropy)

    @property
    def perplexity_original(self) -> float:
        return math.exp(self.cross_entropy_original)

    def to_json(self) -> dict[str, float | int]:
        return asdict(self) | {"perplexity": self.perplexity, "perplexity_original": self.perplexity_original}


class DivergenceMeter:
    """Takes logits of both models window by window; `finish` gives the means."""

    def __init__(self) -> None:
        self._kl = self._ce = self._ce_original = self._agree = 0.0
        self._tokens = 0

    def add(self, original: Tensor, compressed: Tensor, windows: Tensor) -> None:
        """Logits [N, S, vocab] of both models on token ids `windows` [N, S]; position s predicts token s + 1."""
        targets = windows[:, 1:, None]
        a = original[:, :-1].float().log_softmax(-1)
        b = compressed[:, :-1].float().log_softmax(-1)
        self._kl += float((a.exp() * (a - b)).sum(-1).double().sum())
        self._ce -= float(b.gather(-1, targets).double().sum())
        self._ce_original -= float(a.gather(-1, targets).double().sum())
        self._agree += float((a.argmax(-1) == b.argmax(-1)).sum())
        self._tokens += targets.numel()

    def finish(self) -> Divergence:
        count = max(self._tokens, 1)
        return Divergence(
            mean_kl=max(self._kl / count, 0.0),  # rounding can leave -1e-9 for identical models
            cross_entropy=self._ce / count,
            cross_entropy_original=self._ce_original / count,
            top1_agreement=self._agree / count,
            tokens=self._tokens,
        )
