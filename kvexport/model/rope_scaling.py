"""Kinds of RoPE scaling: one class each, which reads its settings and computes its reach and frequencies.

Frequencies are computed with the float32 operations of transformers in their order, so that the tables are
bit-identical. Reading settings does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from kvexport.errors import CheckpointError
from kvexport.model.config import number, shown, whole_number

if TYPE_CHECKING:
    from torch import Tensor

THETA = (2.0, 1e30)  # smallest and largest accepted; published are 1e4 to 1e11
_FACTOR = (1e-6, 1e6)  # the same for every other number; published are 0.07 to 1000


@dataclass(frozen=True)
class RopeTable:
    """Settings of one kind of layer as config.json has them, without nulls, and what is common to all kinds.

    Attributes:
        path: key of the table in config.json, as "rope_parameters.full_attention".
        values: entries of the table.
        kind: scaling that they name.
        theta: base of the frequencies, checked.
        rotary_dim: rotated numbers of a head, checked.
        max_positions: positions of the model; None: not known.
        original: positions before scaling, where config.json has them outside of the table.
    """

    path: str
    values: Mapping[str, Any]
    kind: str
    theta: float
    rotary_dim: int
    max_positions: int | None
    original: Any = None

    @property
    def common(self) -> dict[str, Any]:
        """Arguments of every kind."""
        trained = self.original_positions() if self.values.get("llama_4_scaling_beta") else None
        return {"theta": self.theta, "rotary_dim": self.rotary_dim, "most_positions": trained}

    def require(self, key: str, value: Any) -> Any:
        """A value that this kind needs.

        Raises:
            CheckpointError: the value is None.
        """
        if value is None:
            raise CheckpointError(f"config.json must have {key} with rope_type {self.kind!r}")
        return value

    def optional(self, key: str) -> float | None:
        """A number of the table; None if it is missing or 0."""
        return self.number(key) if self.values.get(key) not in (None, 0) else None

    def number(self, key: str) -> float:
        """A number of the table that must be there."""
        return ranged_number(f"{self.path}.{key}", self.require(key, self.values.get(key)), *_FACTOR)

    def factor(self) -> float:
        """`factor`, or else positions after scaling by those before."""
        if "factor" in self.values or self.max_positions is None:
            return self.number("factor")
        return self.max_positions / self.original_positions()

    def original_positions(self) -> int:
        """Positions before scaling; those of the model if config.json does not say."""
        key = "original_max_position_embeddings"
        stated = (self.original, self.values.get(key), self.max_positions)
        found = next((value for value in stated if value is not None), None)
        return whole_number(key, self.require(key, found), least=2)

    def factors(self, key: str) -> tuple[float, ...]:
        """A list with one number for each rotated pair."""
        values, pairs = self.require(key, self.values.get(key)), self.rotary_dim // 2
        if not isinstance(values, list) or len(values) != pairs:
            raise CheckpointError(
                f"{self.path}.{key} in config.json must have one number for each rotated pair",
                got=f"{len(values)} entries" if isinstance(values, list) else shown(values),
                expected=f"{pairs} numbers",
            )
        return tuple(ranged_number(f"{self.path}.{key}", value, *_FACTOR) for value in values)


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """RoPE without scaling (arXiv 2104.09864), and the base of scaled kinds: settings of one kind of layer.

    Attributes:
        kind: name of the scaling in config.json.
        theta: base of the frequencies.
        rotary_dim: rotated numbers of a head, even.
        most_positions: positions above which the model needs what kvexport does not have, namely queries
            that are scaled by position (`llama_4_scaling_beta`); None: no limit.
    """

    kind: ClassVar[str] = "default"
    theta: float
    rotary_dim: int
    most_positions: int | None = None

    @classmethod
    def read(cls, table: RopeTable) -> RopeConfig:
        """Settings of a table of config.json, checked."""
        return cls(**table.common)

    def reach(self, max_positions: int | None) -> int | None:
        """Positions that this RoPE is meant for; None: not known.

        The reach of a model is the least of its layers': a model with unscaled layers beside scaled ones
        (Gemma 3) has max_position_embeddings after scaling.

        Args:
            max_positions: max_position_embeddings of the model; None: config.json has none.
        """
        return min((each for each in (max_positions, self.most_positions) if each is not None), default=None)

    @property
    def switches_at(self) -> int | None:
        """Tokens above which a sequence has other frequencies; None: all sequences have the same."""
        return None

    def frequencies(self, context: int) -> tuple[Tensor, float]:
        """Frequencies of the rotated pairs, and the factor of cos and sin.

        Two kinds depend on the length of the sequence, `dynamic` and `longrope`. transformers changes their
        frequencies while a sequence grows, and keys that are cached by then keep the old ones. An exported
        graph has one table, chosen by the length that it can hold, as vLLM and llama.cpp do: the scaled
        frequencies for that length if it exceeds the positions before scaling, else those for short
        sequences.

        Args:
            context: capacity in tokens of the longest sequence.

        Returns:
            inv_freq float32 [rotary_dim/2], in radians per position, and the factor.
        """
        return 1.0 / _powers(self.theta, self.rotary_dim), 1.0


@dataclass(frozen=True, kw_only=True)
class StretchedRope(RopeConfig):
    """A scaling by `factor`, from `original` positions; the model may state those after scaling or before."""

    factor: float
    original: int | None

    def reach(self, max_positions: int | None) -> int | None:
        original = max_positions if self.original is None else self.original
        if self.most_positions is not None or original is None:
            return super().reach(max_positions)
        return max(int(self.factor * original), max_positions or 0)


@dataclass(frozen=True, kw_only=True)
class LinearRope(StretchedRope):
    """Position interpolation (arXiv 2306.15595): positions are divided by `factor`."""

    kind = "linear"

    @classmethod
    def read(cls, table: RopeTable) -> RopeConfig:
        return cls(**table.common, factor=table.number("factor"), original=table.max_positions)

    def frequencies(self, context: int) -> tuple[Tensor, float]:
        return super().frequencies(context)[0] / self.factor, 1.0


@dataclass(frozen=True, kw_only=True)
class DynamicRope(StretchedRope):
    """Dynamic NTK scaling (arXiv 2309.00071, section 3.3 and appendix): theta grows with the sequence beyond
    `original` positions.
    """

    kind = "dynamic"
    original: int

    @property
    def switches_at(self) -> int | None:
        return self.original

    @classmethod
    def read(cls, table: RopeTable) -> RopeConfig:
        if table.rotary_dim < 4:
            raise CheckpointError(
                "heads must have 4 or more rotated numbers with rope_type 'dynamic'", got=table.rotary_dim
            )
        alpha = table.optional("alpha")
        if alpha is not None:  # a fixed stretch of theta under the same name (Hunyuan)
            theta = table.theta * alpha ** _ntk_exponent(table.rotary_dim)
            return RopeConfig(**{**table.common, "theta": theta})
        return cls(
            **table.common,
            factor=table.number("factor"),
            original=table.require("max_position_embeddings", table.max_positions),
        )

    def frequencies(self, context: int) -> tuple[Tensor, float]:
        import torch

        # a tensor beyond `original`, as where transformers runs a model: its powers are float32
        length: Any = torch.tensor(context) if context > self.original else self.original
        growth = (self.factor * length / self.original) - (self.factor - 1)
        theta = self.theta * growth ** _ntk_exponent(self.rotary_dim)
        return 1.0 / _powers(theta, self.rotary_dim), 1.0


@dataclass(frozen=True, kw_only=True)
class YarnRope(StretchedRope):
    """YaRN (arXiv 2309.00071): pairs with less than `beta_slow` turns in `original` positions are
    interpolated, those with more than `beta_fast` kept, and those between are mixed.
    """

    kind = "yarn"
    original: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool  # whether the bounds are rounded to whole pairs

    @classmethod
    def read(cls, table: RopeTable) -> RopeConfig:
        factor, scale = table.factor(), table.optional("attention_factor")
        mscale, mscale_all_dim = table.optional("mscale"), table.optional("mscale_all_dim")
        if scale is None and mscale is not None and mscale_all_dim is not None:
            scale = _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all_dim)
        truncate = table.values.get("truncate", True)
        if not isinstance(truncate, bool):
            raise CheckpointError(
                f"{table.path}.truncate in config.json must be true or false", got=shown(truncate)
            )
        fast, slow = table.optional("beta_fast") or 32.0, table.optional("beta_slow") or 1.0
        if fast < slow:
            raise CheckpointError(
                f"{table.path}.beta_fast in config.json must be at least beta_slow",
                got=f"{fast:g} and {slow:g}",
            )
        return cls(
            **table.common,
            factor=factor,
            original=table.original_positions(),
            attention_factor=_yarn_scale(factor) if scale is None else scale,
            beta_fast=fast,
            beta_slow=slow,
            truncate=truncate,
        )

    def _pair_that_turns(self, times: float) -> float:
        """Index of the pair, a fraction, that makes so many turns in `original` positions."""
        turns = math.log(self.original / (times * 2 * math.pi))
        return (self.rotary_dim * turns) / (2 * math.log(self.theta))

    def frequencies(self, context: int) -> tuple[Tensor, float]:
        import torch

        low, high = self._pair_that_turns(self.beta_fast), self._pair_that_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.rotary_dim - 1)
        if low == high:
            high += 0.001
        pairs = torch.arange(self.rotary_dim // 2, dtype=torch.float32)
        kept = 1 - torch.clamp((pairs - low) / (high - low), 0, 1)
        powers = _powers(self.theta, self.rotary_dim)
        inv_freq = 1.0 / (self.factor * powers) * (1 - kept) + 1.0 / powers * kept
        return inv_freq, self.attention_factor


@dataclass(frozen=True, kw_only=True)
class LongRope(RopeConfig):
    """LongRoPE (arXiv 2402.13753): each pair has a factor for sequences of at most `original` positions, and
    one for longer ones.
    """

    kind = "longrope"
    original: int
    short_factor: tuple[float, ...]  # [rotary_dim/2]
    long_factor: tuple[float, ...]  # [rotary_dim/2]
    attention_factor: float

    @property
    def switches_at(self) -> int | None:
        return self.original

    @classmethod
    def read(cls, table: RopeTable) -> RopeConfig:
        original, scale = table.original_positions(), table.optional("attention_factor")
        if scale is None:
            factor = table.factor()
            scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return cls(
            **table.common,
            original=original,
            short_factor=table.factors("short_factor"),
            long_factor=table.factors("long_factor"),
            attention_factor=scale,
        )

    def frequencies(self, context: int) -> tuple[Tensor, float]:
        import torch

        factors = self.long_factor if context > self.original else self.short_factor
        powers = _powers(self.theta, self.rotary_dim)
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * powers), self.attention_factor


@dataclass(frozen=True, kw_only=True)
class Llama3Rope(RopeConfig):
    """Llama 3.1 scaling: low frequencies are divided by `factor`, high ones kept, those between mixed.

    Low are those with less than `low_freq_factor` turns in `original` positions, high those with more than
    `high_freq_factor`.
    """

    kind = "llama3"
    factor: float
    original: int
    low_freq_factor: float
    high_freq_factor: float

    @classmethod
    def read(cls, table: RopeTable) -> RopeConfig:
        low, high = table.number("low_freq_factor"), table.number("high_freq_factor")
        if high <= low:
            raise CheckpointError(
                f"{table.path}.high_freq_factor in config.json must be above low_freq_factor",
                got=f"{high:g} and {low:g}",
            )
        return cls(
            **table.common,
            factor=table.number("factor"),
            original=table.original_positions(),
            low_freq_factor=low,
            high_freq_factor=high,
        )

    def frequencies(self, context: int) -> tuple[Tensor, float]:
        import torch

        inv_freq, _ = super().frequencies(context)
        low, high = self.low_freq_factor, self.high_freq_factor
        wavelength = 2 * math.pi / inv_freq  # positions per turn
        is_slow, is_fast = wavelength > self.original / low, wavelength < self.original / high
        slowed = torch.where(is_slow, inv_freq / self.factor, inv_freq)
        smooth = (self.original / wavelength - low) / (high - low)
        between = (1 - smooth) * slowed / self.factor + smooth * slowed
        return torch.where(is_slow | is_fast, slowed, between), 1.0


KINDS = {kind.kind: kind for kind in (RopeConfig, LinearRope, DynamicRope, YarnRope, LongRope, Llama3Rope)}


def ranged_number(name: str, value: object, least: float, most: float) -> float:
    """A number of config.json in a range."""
    result = number(name, value)
    if not least <= result <= most:
        raise CheckpointError(
            f"{name} in config.json must be a number in range",
            got=f"{result:g}",
            expected=f"a number from {least:g} to {most:g}",
        )
    return result


def _powers(theta: Any, dim: int) -> Tensor:
    """theta^(2i/dim) of pair i, float32 [dim/2]."""
    import torch

    return theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)


def _ntk_exponent(dim: int) -> float:
    """Exponent with which theta grows so that the slowest pair is stretched in proportion."""
    return dim / (dim - 2)


def _yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """Factor of cos and sin in YaRN: 0.1 · mscale · ln(factor) + 1 (arXiv 2309.00071, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
