"""Adam with steps relative to the size of each tensor, warm-up, cosine schedule and gradient clipping.

Schedule and batches are functions of seed and step alone, so that no random state has to be saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_WARM_UP = 0.1  # share of the steps
_BETAS = (0.9, 0.98)
_CLIP = 1.0  # largest norm of all gradients together


class RelativeAdam:
    """Adam (arXiv 1412.6980, algorithm 1) in which step t moves a tensor by at most about rate(t) times its
    RMS.
    """

    def __init__(
        self, scaled_parameters: Iterable[tuple[nn.Parameter, float]], learning_rate: float, steps: int
    ) -> None:
        pairs = list(scaled_parameters)
        self.parameters = [parameter for parameter, _ in pairs]
        self._scales = [rms for _, rms in pairs]
        self._rate, self._steps = learning_rate, steps
        self._adam = torch.optim.Adam(
            [{"params": [parameter]} for parameter in self.parameters], betas=_BETAS
        )

    def step(self, step: int) -> None:
        """Apply the gradients and clear them; `step` counts from 0."""
        torch.nn.utils.clip_grad_norm_(self.parameters, _CLIP)
        rate = self._rate * schedule(step, self._steps)
        for group, scale in zip(self._adam.param_groups, self._scales, strict=True):
            group["lr"] = rate * scale
        self._adam.step()
        self._adam.zero_grad()

    def moments(self) -> tuple[list[Tensor], list[Tensor]]:
        """First and second moments of the parameters; zeros before the first step."""
        states = [self._adam.state.get(parameter, {}) for parameter in self.parameters]
        first, second = (
            [s.get(name, torch.zeros_like(p)) for s, p in zip(states, self.parameters, strict=True)]
            for name in ("exp_avg", "exp_avg_sq")
        )
        return first, second

    def load(self, first: list[Tensor], second: list[Tensor], steps: int) -> None:
        """Restore the state after `steps` steps from saved moments."""
        for parameter, mean, square in zip(self.parameters, first, second, strict=True):
            self._adam.state[parameter] = {
                "step": torch.tensor(float(steps)),
                "exp_avg": mean,
                "exp_avg_sq": square,
            }


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate at a step: linear warm-up, then a half cosine that ends near zero."""
    warm = max(1, round(_WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm + 1) / (steps - warm + 1)))


def batch_of(count: int, batch: int, seed: int, step: int) -> Tensor:
    """Indices of the windows of a step, [batch] int64; every epoch has its own order of windows."""
    batch = min(batch, count)
    epoch, at = divmod(step, count // batch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[at * batch : (at + 1) * batch]
