"""The options of a build."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from kvexport.bundle.formats import DTYPES, INTEGERS, require_formats
from kvexport.calibrate import Recipe
from kvexport.convert import CompressionRequest
from kvexport.errors import UsageError
from kvexport.eviction.config import EvictionRequest
from kvexport.model.placement import AUTO
from kvexport.quantize.method_names import DEFAULT, METHODS, Method


@dataclass(frozen=True)
class BuildOptions:
    """How to calibrate, compress and write a checkpoint.

    Attributes:
        recipe: the source of the calibration text.
        request: how much to compress the KV cache.
        method: the compression method, one of `METHOD_NAMES`.
        cache: folder of the build cache, where finished stages are kept and found; None: no cache.
        statistics: directory that `calibrate` wrote, in place of calibration text from `recipe`.
        dtype: data type of computation and of the KV cache: float32, float16 or bfloat16.
        weights: format of the weights of linear maps: int8, int4 or the dtype; None: the dtype.
        head_weights: format of the head's weights; None: that of `weights`.
        embedding_weights: format of the embedding; None: that of `weights`, or of the head if it is tied.
        weight_method: how the codes of integer weights are chosen, one of `METHODS`.
        weight_block: largest number of weights that share a scale in int4, of `BLOCKS`; None: 128, or 64 in a
            model less than 2048 wide.
        weight_bits: largest mean number of bits of the weights that are stored as integers, with their
            scales; head and embedding count unless their format is given. None: `DEFAULT_BITS`.
        weight_max_kl: largest predicted KL of these weights in nats per token, in place of `weight_bits`.
        eviction: policy and budget of a cache that evicts tokens; None: the cache keeps all tokens.
        heal: number of distillation steps after conversion; None: no distillation.
        heal_lora: rank of the adapters that distillation trains; None: it trains whole weights.
        device: device on which PyTorch computes, as `kvexport.model.placement.resolve_device` takes it.

    Raises (on construction):
        UsageError: the data type is unknown, or a format of weights does not go with it.
    """

    recipe: Recipe
    request: CompressionRequest = field(default_factory=CompressionRequest)
    method: str = "auto"
    statistics: Path | None = None
    cache: Path | None = None
    dtype: str = "float32"
    weights: str | None = None
    head_weights: str | None = None
    embedding_weights: str | None = None
    weight_method: Method = DEFAULT
    weight_block: int | None = None
    weight_bits: float | None = None
    weight_max_kl: float | None = None
    eviction: EvictionRequest | None = None
    heal: int | None = None
    heal_lora: int | None = None
    device: str = AUTO

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(
                "--dtype must be a supported data type", got=self.dtype, expected=", ".join(DTYPES)
            )
        require_formats(
            self.dtype, self.weights, self.head_weights, self.embedding_weights, self.weight_block
        )
        if self.weight_method not in METHODS:
            raise UsageError(
                "--weight-method must be a method of quantisation",
                got=self.weight_method,
                expected=", ".join(METHODS),
            )

        self._require_mixed_bits()

    def _require_mixed_bits(self) -> None:
        given = {"--weight-bits": self.weight_bits, "--weight-max-kl": self.weight_max_kl}
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise UsageError(
                f"{names[0]} and {names[1]} must not be given together",
                got="both",
                fix="leave out one of them",
            )
        for name in names:
            value = given[name]
            if value is None or not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} must be a finite number > 0", got=value)
            if self.weights != "int4":
                raise UsageError(
                    f"{name} must be given with --weights int4, of which it gives some weights 8 bits",
                    got=f"--weights {self.weights or self.dtype}",
                    fix=f"add --weights int4, or leave out {name}",
                )
            if not self.mixes_bits:
                raise UsageError(
                    f"{name} must be given with a --weight-method that reads calibration text",
                    got=f"--weight-method {self.weight_method}",
                    expected=", ".join(each for each in METHODS if each != "nearest"),
                )

    @property
    def mixes_bits(self) -> bool:
        """Whether weights get 4 or 8 bits by their measured sensitivity."""
        return self.weights == "int4" and self.weight_method != "nearest"

    @property
    def quantizes(self) -> bool:
        """Whether any weights are stored as integers."""
        return bool({self.weights, self.head_weights, self.embedding_weights} & {*INTEGERS})
