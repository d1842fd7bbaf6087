"""RoPE in PyTorch: tables of cos and sin, and the rotation of heads by them."""

from __future__ import annotations

import torch
from torch import Tensor

from kvexport.model.decoder import Rope


def rotary_tables(rope: Rope, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin times the magnitude, each [B, 1, S, head_dim/2], of int64 positions [B, S].

    Angles, cos and sin are float32 for every `dtype`, as in the models' training.
    """
    angles = positions[:, None, :, None].float() * rope.inv_freq.float()
    cos, sin = angles.cos(), angles.sin()
    if rope.magnitude is not None:
        cos, sin = cos * rope.magnitude, sin * rope.magnitude
    return cos.to(dtype), sin.to(dtype)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE (arXiv 2104.09864) on x [B, H, S, head_dim] with half-split pairs."""
    cos, sin = tables
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def select(tables: tuple[Tensor, Tensor], frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of both tables for cached pairs with these frequencies [pairs] int64."""
    cos, sin = tables
    return cos[..., frequencies], sin[..., frequencies]
