"""Moments of a layer on the side of RoPE on which a method codes its keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvexport.calibrate import Moments, Rotations, average_over_positions, uncentre_keys
from kvexport.convert.permute import permute_moments
from kvexport.model.decoder import Attention


@dataclass(frozen=True)
class CodeMoments:
    """Input of a method's codes.

    Attributes:
        moments: moments of keys and queries where keys are coded: before RoPE or after it.
        distances: averages over the rotations between the coded keys and the queries that see them; None if
            keys are coded after RoPE, or if there is no RoPE.
    """

    moments: Moments
    distances: Rotations | None = None

    def permute_heads(self, order: Sequence[int]) -> CodeMoments:
        """Reorder the KV heads; head `order[i]` moves to place i."""
        return replace(self, moments=permute_moments(self.moments, order))


def make_code_moments(
    before_rotation: bool, moments: Moments, attention: Attention, positions: int
) -> CodeMoments:
    """Convert calibration moments, which are before RoPE, to those that a method's codes need.

    Args:
        before_rotation: whether the method codes keys before RoPE.
        moments: moments before RoPE.
        attention: the unconverted layer; its window bounds the distances between query and key.
        positions: positions of the deployed context, over which moments are averaged.
    """
    rope, window = attention.rope, attention.window
    if rope is None:
        return CodeMoments(moments)
    if before_rotation:
        return CodeMoments(
            uncentre_keys(moments),
            Rotations.by_distance(rope, positions if window is None else min(positions, window)),
        )
    rotated = average_over_positions(moments, rope, positions)
    return CodeMoments(_weigh_norms(rotated, attention) if attention.norm_after_rotation else rotated)


def _weigh_norms(moments: Moments, attention: Attention) -> Moments:
    """Moments of keys and queries multiplied by the weights of norms that follow the rotation."""
    assert attention.q_norm is not None and attention.q_norm.weight is not None
    assert attention.k_norm is not None and attention.k_norm.weight is not None
    query, key = attention.q_norm.weight.double(), attention.k_norm.weight.double()
    keys = key.repeat(attention.num_kv_heads)
    return replace(
        moments,
        key_mean=moments.key_mean * keys,
        key_second=moments.key_second * torch.outer(keys, keys),
        query_second=moments.query_second * torch.outer(query, query),
    )
