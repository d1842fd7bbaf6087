"""Rotary frequencies and ALiBi slopes from config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvexport.errors import CheckpointError
from kvexport.model.config import number, whole_number
from kvexport.model.decoder import Rope

if TYPE_CHECKING:
    import torch


def rope_of(config: Mapping[str, Any], head_dim: int) -> Rope:
    """RoPE frequencies (arXiv 2104.09864) of a config in its old (`rope_theta`, `rope_scaling`) or new form
    (`rope_parameters`).

    Raises:
        CheckpointError: a scaling other than default, linear or llama3, different settings per kind of layer,
            or rotation of a part of each head.
    """
    import torch

    settings = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(settings, dict) or any(isinstance(value, dict) for value in settings.values()):
        raise CheckpointError(
            "the rotary settings of config.json must be one table for all layers", got=repr(settings)
        )
    outside = {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor")}  # in old configs
    settings = {key: value for key, value in {**outside, **settings}.items() if value is not None}
    theta = number("rope_theta", settings.get("rope_theta", 10000.0))
    kind = settings.get("rope_type", settings.get("type", "default"))
    if number("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0)) != 1.0:
        raise CheckpointError(
            "RoPE in config.json must rotate whole heads",
            got=f"partial_rotary_factor = {settings['partial_rotary_factor']}",
            expected="partial_rotary_factor = 1",
        )
    inv_freq = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    try:
        if kind == "linear":
            inv_freq = inv_freq / number("factor", settings["factor"])
        elif kind == "llama3":
            inv_freq = _llama3_frequencies(inv_freq, settings)
        elif kind != "default":
            raise CheckpointError(
                "the RoPE scaling in config.json must be supported",
                got=f"rope_type = {kind!r}",
                expected="default, linear, llama3",
            )
    except KeyError as error:
        raise CheckpointError(f"config.json must have {error.args[0]} with rope_type {kind!r}") from error
    return Rope(inv_freq)


def _llama3_frequencies(inv_freq: torch.Tensor, settings: Mapping[str, Any]) -> torch.Tensor:
    """Llama 3.1 scaling: low frequencies are divided by `factor`, high ones kept, those between interpolated.

    The float32 operations and their order are those of transformers, so that the tables are bit-identical.
    """
    import torch

    low, high = (
        number("low_freq_factor", settings["low_freq_factor"]),
        number("high_freq_factor", settings["high_freq_factor"]),
    )
    factor = number("factor", settings["factor"])
    context = whole_number("original_max_position_embeddings", settings["original_max_position_embeddings"])
    wavelength = 2 * math.pi / inv_freq  # positions per turn
    is_slow, is_fast = wavelength > context / low, wavelength < context / high
    slowed = torch.where(is_slow, inv_freq / factor, inv_freq)
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * slowed / factor + smooth * slowed
    return torch.where(is_slow | is_fast, slowed, between)


def alibi_slopes(num_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """ALiBi slope of each head, [num_heads]: 2^(-8i/n), interleaved if n is not a power of two (arXiv
    2108.12409, section 3).

    Powers of a float32 base, as in transformers, so that the slopes are bit-identical.
    """
    import torch

    def powers(exponent: float, exponents: torch.Tensor) -> torch.Tensor:
        return torch.pow(torch.tensor(2.0**exponent, dtype=torch.float32), exponents)

    power = 2 ** math.floor(math.log2(num_heads))
    slopes = powers(-8 / power, torch.arange(1, power + 1, dtype=torch.int32))
    extra = powers(-4 / power, 1 + 2 * torch.arange(num_heads - power, dtype=torch.int32))
    return torch.cat((slopes, extra)).to(dtype)
