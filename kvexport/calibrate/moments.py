"""Second moments of one attention layer, accumulated in float64 while text streams through it.

Knows what conversion needs to know about a layer's data: how keys, queries and values vary, how alike heads
attend, and how strongly each head's output answers to errors in its logits. Must not know what any method
does with them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kvexport.calibrate import windows
from kvexport.model import reference
from kvexport.model.decoder import Attention, Rope


@dataclass(frozen=True)
class Moments:
    """Means over calibration tokens, float64. h key heads, H query heads, d = head_dim; keys and queries are
    normalised. They are accumulated as they are before rotation; `over_positions` gives them as they meet in the
    dot product."""

    tokens: Tensor  # [] int64: tokens seen
    key_mean: Tensor  # [h·d]
    key_second: Tensor  # [h·d, h·d], E[k kᵀ]
    query_second: Tensor  # [H, d, d], E[q qᵀ]
    value_mean: Tensor  # [h·d]
    value_second: Tensor  # [h·d, h·d], E[v vᵀ]
    overlap: Tensor  # [H, H], E_m Σ_n a_mn a'_mn: how alike two heads attend
    key_gain: Tensor  # [H], E_m Σ_n a_mn² |W_O (v_n - o_m)|²: output error per unit of logit error
    output_power: Tensor  # [], E|attention output|², after W_O, about its mean

    def key_covariance(self, rows: slice) -> Tensor:
        """Covariance of the keys in `rows` of the stack, [n, n]."""
        return self.key_second[rows, rows] - torch.outer(self.key_mean[rows], self.key_mean[rows])

    def value_covariance(self, rows: slice) -> Tensor:
        """Covariance of the values in `rows` of the stack, [n, n]."""
        return self.value_second[rows, rows] - torch.outer(self.value_mean[rows], self.value_mean[rows])


class MomentsAccumulator:
    """Sums over batches; `finish` divides. Memory does not depend on how many batches were added."""

    def __init__(self, attention: Attention) -> None:
        self._attention = attention
        keys, values = attention.k.weight.shape[0], attention.v.weight.shape[0]
        heads, width, hidden = attention.num_heads, attention.head_dim, attention.o.weight.shape[0]

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        self._tokens = 0
        self._key_mean, self._key_second = zeros(keys), zeros(keys, keys)
        self._value_mean, self._value_second = zeros(values), zeros(values, values)
        self._query_second, self._overlap, self._gain = (
            zeros(heads, width, width),
            zeros(heads, heads),
            zeros(heads),
        )
        self._output_mean, self._output_power = zeros(hidden), zeros()
        # The metric that W_O puts on one head's output, so that |W_O x|² = xᵀ M x: [H, d, d].
        per_head = attention.o.weight.double().unflatten(1, (heads, -1)).transpose(0, 1)  # [H, hidden, d]
        self._metric = per_head.transpose(1, 2) @ per_head

    def add(self, x: Tensor, rope: Rope | None) -> Tensor:
        """Take in normed inputs [B, S, hidden] of whole windows; returns the attention output [B, S, hidden]."""
        projected = windows.project(self._attention, x, rope)
        self._tokens += x.shape[0] * x.shape[1]
        self._key_mean += _add_second(self._key_second, projected.key)
        self._value_mean += _add_second(self._value_second, projected.value)
        queries = projected.query.double().transpose(0, 1).flatten(1, 2)  # [H, B·S, d]
        self._query_second += queries.transpose(1, 2) @ queries
        output = reference.linear(
            self._attention.o, windows.head_outputs(self._attention, projected, self._look)
        )
        self._output_mean += output.double().sum((0, 1))
        self._output_power += output.double().square().sum()
        return output

    def _look(self, probabilities: Tensor, value: Tensor) -> None:
        """Add what rows of attention [B, H, M, N] over values [B, h, N, d] say of overlap and logit gain.

        The gain Σ_n a_mn² |W_O (v_n - o_m)|² is expanded so that nothing of the scores' size is made but a²; the
        values are centred first, which changes no difference and keeps the expansion exact in float32.
        """
        flat = probabilities.flatten(2)  # [B, H, M·N]
        self._overlap += (flat @ flat.transpose(1, 2)).double().sum(0)
        centred = (value - value.mean(2, keepdim=True)).repeat_interleave(
            self._attention.queries_per_kv_head, dim=1
        )
        metric = self._metric.to(value.dtype)
        measured = centred @ metric  # [B, H, N, d]
        powers = (measured * centred).sum(-1, keepdim=True)  # |W_O v_n|², [B, H, N, 1]
        output = probabilities @ centred  # [B, H, M, d]
        squares = probabilities.square()
        output_power = (output @ metric * output).sum(-1)  # [B, H, M]
        gain = (squares @ powers).squeeze(-1) + output_power * squares.sum(-1)
        gain -= 2 * (squares @ measured * output).sum(-1)
        self._gain += gain.clamp_min(0).double().sum((0, 2))

    def finish(self) -> Moments:
        count = max(self._tokens, 1)
        mean = self._output_mean / count
        return Moments(
            tokens=torch.tensor(self._tokens),
            key_mean=self._key_mean / count,
            key_second=self._key_second / count,
            query_second=self._query_second / count,
            value_mean=self._value_mean / count,
            value_second=self._value_second / count,
            overlap=self._overlap / count,
            key_gain=self._gain / count,
            output_power=self._output_power / count - mean.square().sum(),
        )


def _add_second(total: Tensor, x: Tensor) -> Tensor:
    """Adds Σ x xᵀ of [B, h, S, d] to `total` [h·d, h·d] in place; returns Σ x [h·d]."""
    rows = x.double().transpose(1, 2).flatten(2).flatten(0, 1)  # [B·S, h·d]
    total.addmm_(rows.T, rows)
    return rows.sum(0)


MOMENT_NAMES = tuple(field.name for field in fields(Moments))
