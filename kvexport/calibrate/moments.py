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

    Means over keys and values weigh each token by what an error of it costs (`MomentsAccumulator`): a few
    tokens get most of the attention, such as the first of a sequence.

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
    """Accumulates the moments of one unconverted layer; memory does not depend on the number of batches.

    The error of a token's value reaches the outputs of all queries that attend to it, that of its key their
    logits. So token n has the weight

        Σ_m a_mn² for its values,    Σ_m a_mn² |W_O (v_n - o_m)|² for its keys,

    summed over the query heads and over the queries m of its window (`Moments` has the notation).
    """

    def __init__(self, attention: Attention, *, weighted: bool = True) -> None:
        """
        Args:
            attention: of the layer.
            weighted: whether tokens have these weights; otherwise all tokens count alike.
        """
        self._attention, self._weighted = attention, weighted
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
        self._queries.add(projected.query.transpose(0, 1).flatten(1, 2))
        heads = windows.head_outputs(self._attention, projected)  # as it is where moments are given
        received, gain = self._received(projected, heads)
        self._gain += gain.sum((0, 2), dtype=torch.float64)
        for sums, rows, weights in (
            (self._keys, projected.key, gain.sum(1)),
            (self._values, projected.value, received),
        ):
            sums.add(_rows(rows), weights.flatten() if self._weighted else None)
        output = reference.linear(self._attention.o, heads)
        every = output.double().flatten(0, 1)
        self._output_mean += every.sum(0)
        self._output_power += torch.dot(every.flatten(), every.flatten())
        return output

    def _received(self, projected: Projected, heads: Tensor) -> tuple[Tensor, Tensor]:
        """What each token receives of the attention rows, whose concatenated head outputs are `heads`.

        The gain Σ_m a_m² |W_O (v - o_m)|² of a token is expanded to |W_O v|² Σ_m a_m² - 2 vᵀ Σ_m a_m² M o_m +
        Σ_m a_m² o_mᵀ M o_m, so that a² is the only tensor of the size of the scores. The values are centred
        first, which does not change v - o and avoids cancellation in float32. The overlap of the heads is
        added up meanwhile.

        Returns:
            Σ_m a_m² over all query heads, [B, S], and the gain of each query head, [B, H, S].
        """
        attention, value = self._attention, wide(projected.value)
        batch, length, width = len(value), *value.shape[2:]
        heads_per_group = attention.queries_per_kv_head
        mean = value.mean(2, keepdim=True)
        centred = value - mean
        mean = mean.transpose(1, 2).repeat_interleave(heads_per_group, 2)  # [B, 1, H, d]
        output = wide(heads).unflatten(2, (-1, width)) - mean  # o, [B, S, H, d]
        by_head = output.flatten(0, 1).transpose(0, 1)  # [H, B·S, d]
        response = (by_head @ self._metric).unflatten(1, (batch, length)).transpose(0, 1)  # M o, [B, H, S, d]
        power = (response * output.transpose(1, 2)).sum(-1, keepdim=True)  # oᵀ M o
        factors = torch.cat((response, power, torch.ones_like(power)), -1)  # [B, H, S, d + 2]
        sums = torch.zeros_like(factors)  # Σ_m a_m² of the factors
        for block in windows.probability_blocks(attention, projected):
            probabilities = wide(block.probabilities)
            flat = probabilities.view(len(probabilities), attention.num_heads, -1)  # [b, H, M·N]
            self._overlap += (flat @ flat.transpose(1, 2)).sum(0)
            squared = probabilities.square_()
            squared = squared.view(*flat.shape[:2], -1, squared.shape[3])  # [b, H, M, N]
            rows = factors[block.windows, :, block.rows]
            sums[block.windows, :, block.visible] += squared.transpose(2, 3) @ rows
        values = centred.repeat_interleave(heads_per_group, 1)  # [B, H, S, d]
        powers = self._powers(centred).transpose(2, 3).flatten(1, 2)  # |W_O v|², [B, H, S]
        received, constant = sums[..., width + 1], sums[..., width]
        gain = powers * received - 2 * (values * sums[..., :width]).sum(-1) + constant
        return received.sum(1), gain.clamp_min_(0)

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
