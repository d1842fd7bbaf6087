"""Loss of a group of KV heads at every width of the cached head, from a layer's moments.

A loss is the power of the error of the attention output, E|Δo|², by the same model as
`kvexport.convert.predict`; losses of keys, values and groups add. One eigenvalue problem per side gives the
losses at all widths; only keys coded before RoPE need codes made at a few widths. n = t·d below is the width
of the group's stack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from kvexport.calibrate import Moments
from kvexport.convert.code_moments import CodeMoments
from kvexport.convert.folding import Folding, mix_covariances, mix_energies
from kvexport.convert.groups import WIDEST, Grouping
from kvexport.convert.keys import frequencies_with_most, query_weights
from kvexport.convert.matching import PROPOSALS, Group, match_heads
from kvexport.convert.threads import map_on_threads
from kvexport.convert.values import stacked_output_weights
from kvexport.model.decoder import Attention

# widths, as shares of n, at which codes before RoPE are made; losses between them are interpolated
_SAMPLED_SHARES = (1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
_TINY = 1e-12
_ROUNDS = 5  # alternations of a code whose loss is measured; those of a final code gain a few per cent more
# width of a stack up to which all swaps are proposed; fewer beyond, so that the time is bounded
_ANNEALED = 128


class GroupLosses:
    """Losses of groups at widths 0 .. n, each computed once."""

    def __init__(self, of_group: Callable[[Group], Tensor]) -> None:
        """`of_group`: computes the loss of one group, [n + 1] float64."""
        self._of_group, self._losses = of_group, dict[Group, Tensor]()

    def __call__(self, groups: Sequence[Group]) -> Tensor:
        """Losses of G groups of one size, [G, n + 1] float64."""
        missing = [group for group in dict.fromkeys(groups) if group not in self._losses]
        self._losses.update(zip(missing, map_on_threads(self._of_group, missing), strict=True))
        return torch.stack([self._losses[group] for group in groups])


def value_losses(moments: Moments, attention: Attention) -> GroupLosses:
    """Losses of values of groups of one layer's KV heads; the same for all methods.

    Args:
        moments: moments of the unconverted layer.
        attention: the unconverted layer.
    """
    width = attention.head_dim
    outputs = stacked_output_weights(moments, attention)  # S of all heads, [h·d, h·d]
    covariance = moments.value_covariance(slice(None))  # [h·d, h·d]

    def of_group(group: Group) -> Tensor:
        root, weights = _root(_block(covariance, group, width)), _block(outputs, group, width)
        return _tails(torch.linalg.eigvalsh(root.T @ weights @ root))

    return GroupLosses(of_group)


def key_losses(moments: Moments, scale: float, weights: Tensor) -> GroupLosses:
    """Losses of keys coded after RoPE of groups of one layer's KV heads.

    Args:
        moments: moments of the unconverted layer, after RoPE.
        scale: the attention's scale of logits.
        weights: S of each KV head, [h, d, d].
    """

    @cache
    def weighted() -> Tensor:
        """Covariance of the keys, weighted by the roots of S on both sides, [h·d, h·d]."""
        values, vectors = torch.linalg.eigh(weights)
        roots = scale * (vectors * values.clamp_min(0).sqrt()[:, None] @ vectors.mT)
        half = (roots @ moments.key_covariance(slice(None)).unflatten(0, roots.shape[:2])).flatten(0, 1)
        return (roots @ half.T.unflatten(0, roots.shape[:2])).flatten(0, 1)

    def of_group(group: Group) -> Tensor:
        return _tails(torch.linalg.eigvalsh(_block(weighted(), group, weights.shape[-1])))

    return GroupLosses(of_group)


class LayerLosses:
    """Losses of groups of one unconverted layer's KV heads, at widths 0 .. n.

    What depends on one head or on two is computed once for the layer; a group takes its blocks of it.

    Attributes:
        values: losses of values.
        keys: losses of keys coded after RoPE.
    """

    def __init__(
        self, code_moments: CodeMoments, attention: Attention, values: GroupLosses | None = None
    ) -> None:
        """
        Args:
            code_moments: moments on the side of RoPE on which the method codes keys.
            attention: the unconverted layer.
            values: losses of its values, if they are shared with another method.
        """
        self._code_moments, self._attention = code_moments, attention
        moments = self._moments = code_moments.moments
        self._each = each = Grouping.of(attention, attention.num_kv_heads)
        self._weights = torch.stack([query_weights(moments, each, head) for head in range(each.kv_heads)])
        self.values = values or value_losses(moments, attention)
        self.keys = key_losses(moments, attention.scale, self._weights)

    def match(self, before_rotation: bool, size: int, key_width: int, value_width: int) -> list[Group]:
        """Groups of `size` heads with a small loss of keys and values together.

        Args:
            before_rotation: whether keys are coded before RoPE.
            size: heads per group.
            key_width: width of a group's cached key.
            value_width: width of a group's cached value.
        """

        def losses_of(groups: Sequence[Group]) -> list[float]:
            # part of a group gets its share of the widths
            key, value = (width * len(groups[0]) // size for width in (key_width, value_width))
            keys = self.estimate(groups) if before_rotation else self.keys(groups)
            losses: list[float] = (keys[:, key] + self.values(groups)[:, value]).tolist()
            return losses

        # a loss takes the time of an eigenvalue problem, cubic in the width of the stack
        share = min(1.0, (_ANNEALED / (size * self._each.head_dim)) ** 3)
        return match_heads(self._each.kv_heads, size, losses_of, int(PROPOSALS * share))

    def folded_keys(self, groups: Sequence[Group]) -> Tensor:
        """Losses of G groups' keys coded before RoPE, at widths 0 .. n, [G, n + 1] float64.

        Computed from codes of a few widths, up to the widest that an engine takes, and interpolated between
        them. An odd width loses as much as the even width below it, because cached numbers come in pairs.
        """
        distances, d = self._code_moments.distances, self._each.head_dim
        assert distances is not None
        n, energies = len(groups[0]) * d, self._energies(groups)
        weights = torch.stack([self._weights[list(group)] for group in groups])  # [G, t, d, d]
        second = torch.stack([_block(self._moments.key_second, group, d) for group in groups])  # [G, n, n]
        even = {d, *(2 * round(n * share / 2) for share in _SAMPLED_SHARES)} - {0, n}
        widths = sorted((width for width in even if width <= WIDEST), reverse=True) or [
            n
        ]  # longest task first

        def problem_of(width: int) -> Folding:
            return Folding(weights, second, frequencies_with_most(energies, width), distances)

        def loss(width: int) -> Tensor:
            problem = problem_of(width)
            return problem.loss(problem.code(_ROUNDS))  # [G]

        losses = dict(zip(widths, map_on_threads(loss, widths), strict=True))
        losses[0] = problem_of(widths[-1]).power
        samples = sorted(losses)
        return self._attention.scale**2 * torch.stack(
            [
                _interpolate([(width, float(losses[width][group])) for width in samples], n)
                for group in range(len(groups))
            ]
        )

    def estimate(self, groups: Sequence[Group]) -> Tensor:
        """Loss of G groups' keys coded before RoPE at widths 0 .. n, from one eigenvalue problem for each,
        [G, n + 1] float64.

        The loss of codes that commute with rotation, which lose a few times more than the codes of
        `folded_keys`: accurate enough to compare groups.
        """
        energies = self._attention.scale**2 * self._energies(groups)
        lost = _tails(energies.flatten(1).sort().values).repeat_interleave(2, -1)[:, :-1]
        lost[:, self._each.head_dim] = energies[..., 1:].sum((1, 2))  # here each frequency is cached once
        return lost

    def _energies(self, groups: Sequence[Group]) -> Tensor:
        """`mix_energies` of each group, [G, d/2, t]."""
        heads = torch.tensor(groups)
        return mix_energies(self._mixes[:, heads[:, :, None], heads[:, None, :]].movedim(1, 0))

    @cached_property
    def _mixes(self) -> Tensor:
        """`mix_covariances` of all heads, [d/2, h, h]."""
        return mix_covariances(self._weights, self._moments.key_second)


def _block(matrix: Tensor, group: Group, width: int) -> Tensor:
    """Rows and columns of the heads of a group, each of some width, in a matrix [h·d, h·d], [n, n]."""
    inside, heads = list(group), len(matrix) // width
    return matrix.view(heads, width, heads, width)[inside][:, :, inside].reshape(len(group) * width, -1)


def _root(covariance: Tensor) -> Tensor:
    """R with R Rᵀ = covariance, [n, n]."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return factor
    values, vectors = torch.linalg.eigh(covariance)  # singular, and several times as slow
    return vectors * values.clamp_min(0).sqrt()


def _tails(ascending: Tensor) -> Tensor:
    """Sums of all but the r largest of n eigenvalues [..., n], for r = 0 .. n, [..., n + 1]."""
    return torch.nn.functional.pad(ascending.clamp_min(0).cumsum(-1), (1, 0)).flip(-1)


def _interpolate(samples: Sequence[tuple[int, float]], n: int) -> Tensor:
    """Losses at widths 0 .. n, [n + 1], from (even width, loss) in ascending order, width 0 first.

    Geometric between the samples, linear to 0 beyond the last one.
    """
    widths, losses = np.array([width for width, _ in samples]), np.array([loss for _, loss in samples])
    least = max(float(losses.max()), _TINY) * _TINY
    losses = np.minimum.accumulate(np.maximum(losses, least))  # a wider code can do what a narrower one does
    even = np.arange(0, n + 1, 2)
    curve = np.exp(np.interp(even, widths, np.log(losses)))
    last = int(widths[-1])
    beyond = even > last
    curve[beyond] = losses[-1] * (n - even[beyond]) / max(n - last, 1)
    return torch.from_numpy(curve).repeat_interleave(2)[: n + 1]
