"""A weight that a checkpoint stores as integers: its floats, and symmetric codes where these are the same.

w[o, i] = (q[o, i] - z[o, g]) · s[o, g],   g = the group of column i
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvexport.model.decoder import WeightCodes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BITS = (2, 4, 8)  # that are read: they divide a byte, so that all programs pack them alike


@dataclass(frozen=True)
class IntegerWeight:
    """A weight [out, in] in integers.

    Attributes:
        integers: q less 2^(bits - 1), int8 [out, in].
        scales: s in the stored dtype, [out, groups].
        zeros: z less 2^(bits - 1), int16 [out, groups]; None: all 0.
        groups: the group of each column, int64 [in]; None: groups are equal numbers of adjacent columns.
        bits: bits of an integer, one of `BITS`.
    """

    integers: Tensor
    scales: Tensor
    zeros: Tensor | None
    groups: Tensor | None
    bits: int

    def floats(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in], computed in `dtype`."""
        zeros = self.zeros if self._has_zeros else None
        if self.groups is not None:
            numbers = self.integers.to(dtype)
            if zeros is not None:
                numbers -= zeros[:, self.groups]
            return numbers.mul_(self.scales.to(dtype)[:, self.groups])
        blocks = self.integers.unflatten(1, (self.scales.shape[1], -1)).to(dtype)
        if zeros is not None:
            blocks -= zeros[:, :, None]
        return blocks.mul_(self.scales.to(dtype)[:, :, None]).flatten(1)

    def codes(self, dtype: torch.dtype) -> WeightCodes | str:
        """The same weight as codes and positive scales in `dtype`, or why there are none.

        Where a scale is negative, codes change their sign. The lowest code, -8 of 4 bits, has no opposite: it
        becomes 7, and the codes are `saturated`. AutoRound gives it to the largest number of most such
        blocks.
        """
        import torch

        if self._has_zeros:
            return "asymmetric (zero points)"
        scales = self._block_scales()
        if scales is None:
            return "act-order: groups are not adjacent columns (desc_act)"
        codes = self.integers.unflatten(1, (scales.shape[1], -1))
        bits: Literal[4, 8] = 8 if self.bits == 8 else 4
        negative, lowest, saturated = scales < 0, -(1 << bits - 1), False
        if bool(negative.any()):
            saturated = bool((codes[negative] == lowest).any())
            codes = torch.where(negative[:, :, None], -codes.clamp_min(lowest + 1), codes)
        empty = scales == 0
        if bool(empty.any()):
            codes = codes * ~empty[:, :, None]
        scales = torch.where(empty, torch.ones_like(scales), scales.abs()).to(dtype)
        return WeightCodes(codes.flatten(1).contiguous(), scales.contiguous(), bits, saturated)

    @property
    def _has_zeros(self) -> bool:
        return self.zeros is not None and bool(self.zeros.any())

    def _block_scales(self) -> Tensor | None:
        """Scales of equal blocks of adjacent columns; None if the groups are not such blocks."""
        if self.groups is None:
            return self.scales
        count = self.scales.shape[1]
        if len(self.groups) % count:
            return None
        blocks = self.groups.unflatten(0, (count, -1))
        if not bool((blocks == blocks[:, :1]).all()):
            return None
        return self.scales[:, blocks[:, 0]]


def unpack(words: Tensor, bits: int) -> Tensor:
    """The numbers in int32 words [rows, n], lowest bits first: uint8 [rows, n · 32 / bits]."""
    import torch

    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return ((octets[..., None] >> shifts) & ((1 << bits) - 1)).flatten(1)


def centred(numbers: Tensor, bits: int) -> Tensor:
    """Unsigned numbers less 2^(bits - 1), int8."""
    import torch

    if bits == 8:
        return (numbers ^ 128).view(torch.int8)
    return numbers.view(torch.int8) - (1 << bits - 1)
