"""The report of a build: report.json in a bundle, and the object that `kvexport build --json` prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from kvexport.build.read_back import ReadBack
from kvexport.build.source_weights import SourceWeights
from kvexport.bundle.formats import StoredWeights
from kvexport.bundle.layer_report import LayerReport
from kvexport.eviction.config import Eviction
from kvexport.heal import HealReport
from kvexport.model.divergence import Divergence
from kvexport.validate import ValidationReport


@dataclass(frozen=True)
class FrontierPoint:
    """A cache size that was considered, with its loss.

    Attributes:
        kv_bytes_per_token: bytes that a token adds to the cache.
        predicted_kl: predicted mean KL divergence from the original model, in nats per token.
        measured_kl: the same, measured on held-out calibration text; None: that size was not converted.
    """

    kv_bytes_per_token: int
    predicted_kl: float
    measured_kl: float | None


@dataclass(frozen=True)
class WeightBits:
    """The choice between 4 and 8 bits, for all weights that no option fixes.

    Attributes:
        eight_bits: weights that have 8 bits: a layer's number from 0 and the name of its linear map, such as
            "3.down", or "head" or "embedding", which is also a tied head.
        predicted_kl: predicted mean KL divergence from the model in float, in nats per token.
        bits: mean number of bits of a weight, with its scales, in the shapes before compression.
        bytes: bytes of codes and scales, in the shapes before compression.
    """

    eight_bits: tuple[str, ...]
    predicted_kl: float
    bits: float
    bytes: int


@dataclass(frozen=True)
class BuildReport:
    """Sizes and losses of a converted model.

    Attributes:
        source: name of the checkpoint.
        layers: shape, method and errors of each layer.
        kv_bytes_per_token: bytes that a token adds to the cache; `_original` before conversion, in the same
            dtype.
        parameters: number of weights; `_original` before conversion.
        divergence: from the original model, on held-out calibration text; None if nothing was converted.
        seconds: wall time of each stage.
        reused: stages whose results were in the build cache or in the statistics given.
        validation: comparison of the exported graph with its PyTorch reference; None for a Hugging Face
            checkpoint.
        read_back: comparison of a Hugging Face checkpoint, read back, with the converted model; None for a
            bundle.
        kept_float32: parts of a float16 graph that are computed in float32, because float16 would overflow.
        device: the device on which PyTorch computed, such as "cpu" or "cuda:0 (NVIDIA RTX 4090)".
        calibration: the recipe of the calibration text, as in the manifest; None if nothing was compressed.
        frontier: the cache sizes that were considered, with their losses before healing; empty if the request
            fixed the size.
        healing: the result of distillation, if there was any; `divergence` is then that of the healed model.
        weights: formats of the stored weights; None for a Hugging Face checkpoint.
        weight_bytes: size of the file of the weights.
        source_weights: how the weights of a quantised checkpoint were taken; None: it has floats.
        weight_method: how integer weights were chosen; None: all are floats.
        weight_bits: the choice between 4 and 8 bits; None: there was none.
        quantization: divergence of the quantised model from the same model in float, after compression, on
            held-out calibration text; None if no weight was quantised.
        eviction: policy and budget of the bundle's cache; None: it keeps all tokens.
        capacity: maximum sequence length of the bundle in tokens.
        kv_bytes_at_capacity: bytes of the cache of one sequence of that length, with the state of eviction;
            `_original` before conversion and without eviction. Layers with a sliding window hold it alone in
            both.
    """

    source: str
    layers: list[LayerReport]
    kv_bytes_per_token: int
    kv_bytes_per_token_original: int
    parameters: int
    parameters_original: int
    divergence: Divergence | None
    seconds: dict[str, float]
    device: str
    calibration: dict[str, Any] | None = None
    reused: list[str] = field(default_factory=list)
    validation: ValidationReport | None = None
    read_back: ReadBack | None = None
    kept_float32: list[str] = field(default_factory=list)
    frontier: list[FrontierPoint] = field(default_factory=list)
    healing: HealReport | None = None
    weights: StoredWeights | None = None
    weight_bytes: int | None = None
    source_weights: SourceWeights | None = None
    weight_method: str | None = None
    weight_bits: WeightBits | None = None
    quantization: Divergence | None = None
    eviction: Eviction | None = None
    capacity: int | None = None
    kv_bytes_at_capacity: int | None = None
    kv_bytes_at_capacity_original: int | None = None

    @property
    def longest_stage(self) -> str:
        """The stage that took most of the time."""
        return max(self.seconds, key=self.seconds.__getitem__)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            **asdict(self),
            "longest_stage": self.longest_stage,
            "eviction": None if self.eviction is None else self.eviction.to_json(),
            "weights": None if self.weights is None else self.weights.to_json(),
            "weight_method": self.weight_method,
            "quantization": None if self.quantization is None else self.quantization.to_json(),
            "divergence": None if self.divergence is None else self.divergence.to_json(),
            "healing": None if self.healing is None else self.healing.to_json(),
            "validation": None if self.validation is None else self.validation.to_json(),
        }
