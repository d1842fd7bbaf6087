"""Second moments of one attention layer, accumulated over batches of calibration windows.

The moments describe how keys, queries and values vary, how similarly heads attend, and how strongly the
output of each head responds to errors of its logits.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kvexport.calibrate import windows
from kvexport.calibrate.sums import SecondMomentSums, wide
from kvexport.model import reference
from kvexport.model.decoder import Attention
from kvexport.model.reference import Projected


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
    """Accumulates the moments of one unconverted layer; memory does not depend on the number of batches."""

    def __init__(self, attention: Attention) -> None:
        self._attention = attention
        weight = attention.o.weight
        heads, device = attention.num_heads, weight.device
        self._keys = SecondMomentSums(attention.k.weight.shape[0], device=device)
        self._queries = SecondMomentSums(heads, attention.head_dim, device=device)
        self._values = SecondMomentSums(attention.v.weight.shape[0], device=device)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self._overlap, self._gain = zeros(heads, heads), zeros(heads)
        self._output_mean, self._output_power = zeros(weight.shape[0]), zeros()
        # metric M of each head's output, |W_O x|² = xᵀ M x: [H, d, d]
        per_head = weight.double().unflatten(1, (heads, -1)).transpose(0, 1)  # [H, hidden, d]
        self._metric = (per_head.transpose(1, 2) @ per_head).to(wide(weight).dtype)

    def add(self, x: Tensor) -> Tensor:
        """Add normed inputs x [B, S, hidden] of whole windows; returns the attention output, same shape."""
        projected = windows.project(self._attention, x)
        self._keys.add(_rows(projected.key))
        self._values.add(_rows(projected.value))
        self._queries.add(projected.query.transpose(0, 1).flatten(1, 2))
        heads = windows.head_outputs(self._attention, projected)  # as it is where moments are given
        self._add_attention(projected, heads)
        output = reference.linear(self._attention.o, heads)
        every = output.double().flatten(0, 1)
        self._output_mean += every.sum(0)
        self._output_power += torch.dot(every.flatten(), every.flatten())
        return output

    def _add_attention(self, projected: Projected, heads: Tensor) -> None:
        """Add overlap and gain of all attention rows, whose concatenated head outputs are `heads`.

        The gain Σ_n a_n² |W_O (v_n - o)|² is expanded to Σ_n a_n² |W_O v_n|² - 2 (Σ_n a_n² v_n)ᵀ M o +
        (Σ_n a_n²) oᵀ M o, so that a² is the only tensor of the size of the scores. The values are centred
        first, which does not change v_n - o and avoids cancellation in float32.
        """
        attention, value = self._attention, wide(projected.value)
        batch, length, width = len(value), *value.shape[2:]
        queries = attention.queries_per_kv_head
        mean = value.mean(2, keepdim=True)
        centred = value - mean
        # values, 1, and |W_O v_n|² of each query head of the group: [B, h, S, d + 1 + G]
        factors = torch.cat((centred, torch.ones_like(centred[..., :1]), self._powers(centred)), -1)
        squared = value.new_empty(batch, length, attention.num_heads, width)  # Σ_n a_n² v_n
        total, gain = value.new_empty(2, batch, length, attention.num_heads)  # Σ_n a_n², Σ_n a_n² |W_O v_n|²
        for block in windows.probability_blocks(attention, projected):
            probabilities = wide(block.probabilities)
            flat = probabilities.view(len(probabilities), attention.num_heads, -1)  # [b, H, M·N]
            self._overlap += (flat @ flat.transpose(1, 2)).sum(0)
            sums = probabilities.square_() @ factors[block.windows, :, block.visible]
            sums = sums.unflatten(2, (queries, -1))  # [b, h, G, M, d + 1 + G]
            at = block.windows, block.rows
            squared[at] = sums[..., :width].flatten(1, 2).transpose(1, 2)
            total[at] = sums[..., width].flatten(1, 2).transpose(1, 2)
            gain[at] = sums[..., width + 1 :].diagonal(dim1=2, dim2=4).transpose(1, 2).flatten(2)
        mean = mean.transpose(1, 2).repeat_interleave(queries, 2)  # [B, 1, H, d]
        output = wide(heads).unflatten(2, (-1, width)) - mean
        by_head = output.flatten(0, 1).transpose(0, 1)  # [H, B·S, d]
        response = (by_head @ self._metric).transpose(0, 1).unflatten(0, (batch, length))  # M o
        gain += (response * (output * total[..., None] - 2 * squared)).sum(-1)
        self._gain += gain.clamp_min_(0).sum((0, 1), dtype=torch.float64)

    def _powers(self, value: Tensor) -> Tensor:
        """|W_O v|² of values [B, h, S, d] for each query head of their group, [B, h, S, G]."""
        groups, width = value.shape[1], value.shape[3]
        by_head = value.transpose(0, 1).flatten(1, 2)  # [h, B·S, d]
        metric = self._metric.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)  # [h, d, G·d]
        measured = (by_head @ metric).unflatten(2, (-1, width))  # [h, B·S, G, d]
        return (measured * by_head[:, :, None]).sum(-1).unflatten(1, (len(value), -1)).transpose(0, 1)

    def finish(self) -> Moments:
        """The means over all tokens added, on the CPU."""
        count = max(self._keys.count, 1)
        mean = self._output_mean / count
        return Moments(
            tokens=torch.tensor(self._keys.count),
            key_mean=self._keys.mean(),
            key_second=self._keys.second(),
            query_second=self._queries.second(),
            value_mean=self._values.mean(),
            value_second=self._values.second(),
            overlap=(self._overlap / count).cpu(),
            key_gain=(self._gain / count).cpu(),
            output_power=(self._output_power / count - mean.square().sum()).cpu(),
        )


def _rows(x: Tensor) -> Tensor:
    """[B, h, S, d] to [B·S, h·d]."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)


MOMENT_NAMES = tuple(field.name for field in fields(Moments))
