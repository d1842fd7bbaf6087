"""Moments of a layer on the side of RoPE on which a method codes its keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvexport.calibrate import Moments, Rotations, average_over_positions, uncentre_keys
from kvexport.convert.permute import permute_moments
from kvexport.model.decoder import Rope


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
    before_rotation: bool, moments: Moments, rope: Rope | None, positions: int, window: int | None = None
) -> CodeMoments:
    """Convert calibration moments, which are before RoPE, to those that a method's codes need.

    Args:
        before_rotation: whether the method codes keys before RoPE.
        moments: moments before RoPE.
        rope: the model's RoPE; None: the model has none.
        positions: positions of the deployed context, over which moments are averaged.
        window: sliding window in tokens, which bounds the distances between query and key; None: no window.
    """
    if rope is None:
        return CodeMoments(moments)
    if before_rotation:
        return CodeMoments(
            uncentre_keys(moments),
            Rotations.by_distance(rope, positions if window is None else min(positions, window)),
        )
    return CodeMoments(average_over_positions(moments, rope, positions))
