"""The options of a build."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kvexport.bundle.formats import BYTES
from kvexport.calibrate import Recipe
from kvexport.convert import CompressionRequest
from kvexport.errors import UsageError
from kvexport.eviction.config import EvictionRequest
from kvexport.model.placement import AUTO


@dataclass(frozen=True)
class BuildOptions:
    """How to calibrate, compress and write a checkpoint.

    Attributes:
        recipe: the source of the calibration text.
        request: how much to compress the KV cache.
        method: the compression method, one of `METHOD_NAMES`.
        cache: folder of the build cache, where finished stages are kept and found; None: no cache.
        statistics: directory that `calibrate` wrote, in place of calibration text from `recipe`.
        dtype: data type of the weights and the KV cache that are written: float32, float16 or bfloat16.
        eviction: policy and budget of a cache that evicts tokens; None: the cache keeps all tokens.
        heal: number of distillation steps after conversion; None: no distillation.
        heal_lora: rank of the adapters that distillation trains; None: it trains whole weights.
        device: device on which PyTorch computes, as `kvexport.model.placement.resolve_device` takes it.

    Raises (on construction):
        UsageError: the data type is unknown.
    """

    recipe: Recipe
    request: CompressionRequest = field(default_factory=CompressionRequest)
    method: str = "auto"
    statistics: Path | None = None
    cache: Path | None = None
    dtype: str = "float32"
    eviction: EvictionRequest | None = None
    heal: int | None = None
    heal_lora: int | None = None
    device: str = AUTO

    def __post_init__(self) -> None:
        if self.dtype not in BYTES:
            raise UsageError(
                "--dtype must be a supported data type", got=self.dtype, expected=", ".join(BYTES)
            )
