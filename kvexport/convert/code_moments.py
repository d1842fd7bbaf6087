"""A layer's moments as its keys' codes meet them: turned by RoPE over the deployed context, or before it.

Knows which side of the rotation a code is on; must not know codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvexport.calibrate import Moments, Rotations, over_positions, unrotated
from kvexport.convert.permute import permute_moments
from kvexport.model.decoder import Rope


@dataclass(frozen=True)
class CodeMoments:
    """What codes are made from.

    Attributes:
        moments: of keys and queries at the place where keys are coded.
        distances: how keys turn between there and the queries; None: not at all.
    """

    moments: Moments
    distances: Rotations | None = None

    def permute_heads(self, order: Sequence[int]) -> CodeMoments:
        """Of the layer with its KV heads in that order."""
        return replace(self, moments=permute_moments(self.moments, order))


def make_code_moments(
    before_rotation: bool, moments: Moments, rope: Rope | None, positions: int, window: int | None = None
) -> CodeMoments:
    """Moments of unrotated keys and queries as codes before RoPE, or after it, are to meet them at so many positions.

    With sliding-window attention, queries see no key further back than `window` tokens.
    """
    if rope is None:
        return CodeMoments(moments)
    if before_rotation:
        return CodeMoments(
            unrotated(moments),
            Rotations.by_distance(rope, positions if window is None else min(positions, window)),
        )
    return CodeMoments(over_positions(moments, rope, positions))
