"""Second moments of one attention layer, accumulated in float64 over batches of calibration windows.

The moments describe how keys, queries and values vary, how similarly heads attend, and how strongly the
output of each head responds to errors of its logits.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kvexport.calibrate import windows
from kvexport.model import reference
from kvexport.model.decoder import Attention


@dataclass(frozen=True)
class Moments:
    """Means over calibration tokens, float64, for h KV heads, H query heads and d = head_dim.

    Keys and queries are taken after QK-norm, if there is one, and before RoPE (`reference.Projected`);
    `average_over_positions` converts their moments to those after RoPE. a_mn is the attention of query m to
    key n, o_m the output of the head.

    Attributes:
        tokens: number of tokens, [] int64.
        key_mean: E[k], [h·d].
        key_second: E[k kᵀ], [h·d, h·d].
        query_second: E[q qᵀ] of each query head, [H, d, d].
        value_mean: E[v], [h·d].
        value_second: E[v vᵀ], [h·d, h·d].
        overlap: E_m Σ_n a_mn a'_mn of each pair of query heads, [H, H]: how similarly two heads attend.
        key_gain: E_m Σ_n a_mn² |W_O (v_n - o_m)|² of each query head, [H]: squared output error per squared
            logit error.
        output_power: power of the attention output after W_O about its mean, [].
    """

    tokens: Tensor
    key_mean: Tensor
    key_second: Tensor
    query_second: Tensor
    value_mean: Tensor
    value_second: Tensor
    overlap: Tensor
    key_gain: Tensor
    output_power: Tensor

    def key_covariance(self, rows: slice) -> Tensor:
        """Covariance of the keys in `rows` of the stack [h·d], [n, n]."""
        return self.key_second[rows, rows] - torch.outer(self.key_mean[rows], self.key_mean[rows])

    def value_covariance(self, rows: slice) -> Tensor:
        """Covariance of the values in `rows` of the stack [h·d], [n, n]."""
        return self.value_second[rows, rows] - torch.outer(self.value_mean[rows], self.value_mean[rows])


class MomentsAccumulator:
    """Accumulates the moments of one layer; memory does not depend on the number of batches."""

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
        # metric M of each head's output, |W_O x|² = xᵀ M x: [H, d, d]
        per_head = attention.o.weight.double().unflatten(1, (heads, -1)).transpose(0, 1)  # [H, hidden, d]
        self._metric = per_head.transpose(1, 2) @ per_head

    def add(self, x: Tensor) -> Tensor:
        """Add normed inputs x [B, S, hidden] of whole windows; returns the attention output, same shape."""
        projected = windows.project(self._attention, x)
        self._tokens += x.shape[0] * x.shape[1]
        self._key_mean += _add_second(self._key_second, projected.key)
        self._value_mean += _add_second(self._value_second, projected.value)
        queries = projected.query.double().transpose(0, 1).flatten(1, 2)  # [H, B·S, d]
        self._query_second += queries.transpose(1, 2) @ queries
        output = reference.linear(
            self._attention.o, windows.head_outputs(self._attention, projected, self._add_attention)
        )
        self._output_mean += output.double().sum((0, 1))
        self._output_power += output.double().square().sum()
        return output

    def _add_attention(self, probabilities: Tensor, value: Tensor) -> None:
        """Add overlap and gain of attention rows [B, H, M, N] over values [B, h, N, d].

        Σ_n a_mn² |W_O (v_n - o_m)|² is expanded so that a² is the only tensor of the size of the scores. The
        values are centred first, which does not change v_n - o_m and avoids cancellation in float32.
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
        """The means over all tokens added."""
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
    """Add Σ x xᵀ of x [B, h, S, d] to `total` [h·d, h·d] in place; returns Σ x [h·d]."""
    rows = x.double().transpose(1, 2).flatten(2).flatten(0, 1)  # [B·S, h·d]
    total.addmm_(rows.T, rows)
    return rows.sum(0)


MOMENT_NAMES = tuple(field.name for field in fields(Moments))
