"""Rotary settings of config.json, RoPE tables, and ALiBi slopes.

Old configs write `rope_theta` and `rope_scaling` with `type`, newer ones `rope_parameters` with `rope_type`,
for all layers or by layer type. Reading settings does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvexport.errors import CheckpointError
from kvexport.model.config import shown, whole_number
from kvexport.model.decoder import Rope
from kvexport.model.rope_scaling import KINDS, THETA, RopeConfig, RopeTable, ranged_number

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["LAYER_TYPES", "RopeConfig", "alibi_slopes", "make_rope", "rope_configs"]

LAYER_TYPES = ("full_attention", "sliding_attention")
_TABLES = ("rope_scaling", "rope_parameters")  # keys of config.json that hold a table, or one by layer type


def rope_configs(
    config: Mapping[str, Any],
    head_dim: int,
    *,
    theta: float = 10000.0,
    fraction: float | None = None,
    local_theta: float | None = None,
    max_positions: int | None = None,
) -> Mapping[str, RopeConfig]:
    """Read the rotary settings of a model for each type of layer.

    Args:
        config: config.json.
        head_dim: width of a head.
        theta: theta of the family if config.json has no rope_theta.
        fraction: rotated part of each head if the table of settings has no partial_rotary_factor; None: the
            one beside the table, or else 1.
        local_theta: theta of `sliding_attention` layers, whose RoPE is not scaled, in configs that do not
            write settings by layer type; None: all layers have the same settings.
        max_positions: positions of the model; None: max_position_embeddings of config.json.

    Returns:
        Settings of "full_attention" and of "sliding_attention".

    Raises:
        CheckpointError: a setting is missing, not of its type, out of range or not supported.
    """
    positions = config.get("max_position_embeddings") if max_positions is None else max_positions
    outside = {
        "theta": _or_default(config.get("rope_theta"), theta),
        "fraction": _or_default(fraction, _or_default(config.get("partial_rotary_factor"), 1.0)),
        "head_dim": head_dim,
        "max_positions": None if positions is None else whole_number("max_position_embeddings", positions),
    }
    original = config.get("original_max_position_embeddings")

    def by_layer_type(path: str, settings: object) -> dict[str, RopeConfig]:
        if not isinstance(settings, dict):
            raise CheckpointError(
                f"{path} in config.json must be one table, or one for each layer type", got=shown(settings)
            )
        nested = {key: value for key, value in settings.items() if isinstance(value, dict)}
        unknown = ", ".join(sorted(nested.keys() - LAYER_TYPES))
        if unknown:
            raise CheckpointError(
                f"{path} in config.json must be one table, or one for each layer type",
                got=f"tables {unknown:.60}",
                expected=", ".join(LAYER_TYPES),
            )
        full, sliding = (nested.get(key, {} if nested else settings) for key in LAYER_TYPES)
        names = (f"{path}.{key}" if nested else path for key in LAYER_TYPES)
        if local_theta is not None and "sliding_attention" not in nested:
            name = "the theta of sliding_attention layers"
            sliding = {"rope_theta": ranged_number(name, local_theta, *THETA)}
        outer = None if nested else original
        return {
            key: _read(name, table, original=outer, **outside)
            for key, name, table in zip(LAYER_TYPES, names, (full, sliding), strict=True)
        }

    tables = [(key, config[key]) for key in _TABLES if config.get(key) not in (None, {})]
    first, *others = [by_layer_type(*each) for each in tables or [(_TABLES[1], {})]]
    if any(other != first for other in others):
        raise CheckpointError(
            "rope_scaling and rope_parameters in config.json must agree",
            fix="remove one of them; rope_parameters also holds rope_theta",
        )
    return first


def make_rope(settings: RopeConfig, head_dim: int, context: int) -> Rope:
    """RoPE of a head whose rotated pairs come first; the others have frequency 0.

    Args:
        settings: settings of the layer.
        head_dim: width of a head, even.
        context: capacity in tokens, see `RopeConfig.frequencies`.

    Raises:
        CheckpointError: the model needs what is not supported for so many tokens.
    """
    import torch

    if settings.most_positions is not None and context > settings.most_positions:
        raise CheckpointError(
            "the capacity must be within original_max_position_embeddings of config.json, because "
            "llama_4_scaling_beta, which scales queries beyond, is not supported",
            got=context,
            expected=f"at most {settings.most_positions}",
        )
    inv_freq, factor = settings.frequencies(context)
    still = head_dim // 2 - len(inv_freq)
    magnitude = torch.cat((torch.full((len(inv_freq),), factor), torch.ones(still))).float()
    return Rope(torch.cat((inv_freq, torch.zeros(still))), None if factor == 1 else magnitude)


def _read(
    path: str,
    table: Mapping[str, Any],
    *,
    theta: object,
    fraction: object,
    head_dim: int,
    max_positions: int | None,
    original: object,
) -> RopeConfig:
    """Settings of one table; the arguments are what config.json has outside of it."""
    values = {key: value for key, value in table.items() if value is not None}
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "su" or (kind == "yarn" and "long_factor" in values):  # earlier names of longrope
        kind = "longrope"
    if not isinstance(kind, str) or kind not in KINDS:
        raise CheckpointError(
            "the RoPE scaling in config.json must be supported",
            got=f"{path}.rope_type = {shown(kind)}",
            expected=", ".join(KINDS),
        )
    part = ranged_number("partial_rotary_factor", values.get("partial_rotary_factor", fraction), 0.0, 1.0)
    rotary_dim = int(head_dim * part + 1e-6)  # the part may be a rounded quotient
    if rotary_dim < 2 or rotary_dim % 2:
        raise CheckpointError(
            "RoPE in config.json must rotate an even number of a head's numbers",
            got=f"{rotary_dim} of head_dim {head_dim} (partial_rotary_factor = {part:g})",
        )
    base = ranged_number("rope_theta", values.get("rope_theta", theta), *THETA)
    return KINDS[kind].read(RopeTable(path, values, kind, base, rotary_dim, max_positions, original))


def _or_default(value: Any, default: Any) -> Any:
    return default if value is None else value


def alibi_slopes(num_heads: int, dtype: torch.dtype, bias_max: float | None = None) -> Tensor:
    """ALiBi slope of each head, [num_heads] (arXiv 2108.12409, section 3).

    Powers of float32 numbers, as in transformers, so that the slopes are bit-identical.

    Args:
        num_heads: number n of query heads.
        dtype: data type of the slopes.
        bias_max: exponent m of the last slope in MPT's form: 2^(-m·i/n) with n rounded up to a power of two,
            of which every second is taken first; None: 2^(-8i/n) with n rounded down, and those of 2n
            between for the remaining heads.
    """
    import torch

    if bias_max is not None:
        power = 2 ** math.ceil(math.log2(num_heads))
        slopes = 1.0 / torch.pow(2, torch.arange(1, power + 1).float() * (bias_max / power))
        if power != num_heads:
            slopes = torch.cat((slopes[1::2], slopes[::2]))[:num_heads]
        return slopes.to(dtype)

    def powers(exponent: float, exponents: Tensor) -> Tensor:
        return torch.pow(torch.tensor(2.0**exponent, dtype=torch.float32), exponents)

    power = 2 ** math.floor(math.log2(num_heads))
    slopes = powers(-8 / power, torch.arange(1, power + 1, dtype=torch.int32))
    extra = powers(-4 / power, 1 + 2 * torch.arange(num_heads - power, dtype=torch.int32))
    return torch.cat((slopes, extra)).to(dtype)
