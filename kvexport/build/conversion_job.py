"""One conversion on its way through the stations: what is asked for, what it holds on the way, and what is said of it in the end.

Knows reading, calibration, choice, conversion and healing, which `build` and `compress` share; nothing of what is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from kvexport.bundle.bundle import BYTES, TOKENIZER_FILE
from kvexport.calibrate import Recipe, Statistics, calibration_windows, sampling_steps
from kvexport.calibrate.text import read_tokenizer
from kvexport.convert import (
    CompressionPlan,
    CompressionRequest,
    Conversion,
    ConvertedLayer,
    LayerReport,
    convert,
    fixed_shape,
    methods_for,
    plan_compression,
    split_windows,
    trained_shape,
    unconverted_layers,
)
from kvexport.errors import UsageError
from kvexport.eviction.config import Eviction, EvictionRequest
from kvexport.files.malloc import return_freed
from kvexport.heal import Healed, HealOptions, HealReport, heal
from kvexport.model.checkpoint import Checkpoint
from kvexport.model.decoder import Decoder, Layer, tensors_of
from kvexport.model.divergence import Divergence
from kvexport.model.loader import load_decoder
from kvexport.progress import Progress
from kvexport.validate import ValidationReport
from kvexport.validate.evaluate import divergence_of

_DEFAULT_CAPACITY = 4096  # where the model's own limit is larger, or it has none


@dataclass(frozen=True)
class BuildOptions:
    """What to make of a checkpoint.

    Attributes:
        method: a name of `METHOD_NAMES`.
        request: how much is to be cached.
        recipe: where calibration text comes from, unless `statistics` (saved by `calibrate`) are given.
        dtype: of weights and cache in what is written.
        eviction: how the cache stays within a budget of tokens; None: it holds all.
        heal: steps of distillation after conversion; None: none.
        heal_lora: rank of the adapters to heal with, in place of the whole weights.
    """

    recipe: Recipe
    request: CompressionRequest = field(default_factory=CompressionRequest)
    method: str = "auto"
    statistics: Path | None = None
    dtype: str = "float32"
    eviction: EvictionRequest | None = None
    heal: int | None = None
    heal_lora: int | None = None


@dataclass(frozen=True)
class FrontierPoint:
    """KV bytes per token, and the mean KL to the original in nats per token: predicted, and measured where tried."""

    kv_bytes_per_token: int
    predicted_kl: float
    measured_kl: float | None


@dataclass
class BuildReport:
    """What was made of a checkpoint and what it cost.

    Attributes:
        kv_bytes_per_token: bytes that a token adds to the cache; `_original` before conversion, same dtype.
        parameters: numbers in the weights; `_original` before conversion.
        divergence: from the trained model, on held-out calibration text; None where nothing was converted.
        validation: of the exported graph against its PyTorch twin; None for a standard checkpoint.
        frontier: what else could have been cached, and what it was predicted, or measured, to lose before healing; empty
            where the plan left no choice.
        healing: what distillation did, where it was asked for; `divergence` is that of the healed model.
        kept_float32: what a float16 graph computes in float32, because calibration showed that float16 cannot hold it.
        eviction: how the cache stays within a budget of tokens, if it does; `capacity` and `kv_bytes_at_capacity`, of one
            sequence with the slots' states, are of a bundle.
        seconds: wall time by stage.
    """

    source: str
    layers: list[LayerReport]
    kv_bytes_per_token: int
    kv_bytes_per_token_original: int
    parameters: int
    parameters_original: int
    divergence: Divergence | None
    seconds: dict[str, float]
    validation: ValidationReport | None = None
    kept_float32: list[str] = field(default_factory=list)
    frontier: list[FrontierPoint] = field(default_factory=list)
    healing: HealReport | None = None
    eviction: Eviction | None = None
    capacity: int | None = None
    kv_bytes_at_capacity: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as `--json` prints them."""
        return {
            **asdict(self),
            "eviction": None if self.eviction is None else self.eviction.to_json(),
            "divergence": None if self.divergence is None else self.divergence.to_json(),
            "healing": None if self.healing is None else self.healing.to_json(),
            "validation": None if self.validation is None else self.validation.to_json(),
        }


class Job:
    """One checkpoint on its way through the stations, with the clock of each stage."""

    def __init__(self, path: Path, plan: BuildOptions, progress: Progress) -> None:
        if plan.dtype not in BYTES:
            raise UsageError(
                "--dtype is not one of those that engines take", got=plan.dtype, expected=", ".join(BYTES)
            )
        self.seconds: dict[str, float] = {}
        self.plan, self.progress = plan, progress
        self.checkpoint = Checkpoint(path)
        with self.timed("read"):
            self.decoder = load_decoder(self.checkpoint)
            attention = self.decoder.layers[0].attention
            self.digest = self.checkpoint.digest()
        self.methods = methods_for(plan.method, attention)
        self.compresses = fixed_shape(plan.request, self.methods, attention) != trained_shape(attention)
        if plan.heal is not None and not self.compresses:
            raise UsageError(
                "--heal has nothing to heal: every head stays as it was trained",
                got=f"--heal {plan.heal}",
                fix="lower --kv-ratio or --kv-heads, or leave --heal out",
            )
        if plan.heal_lora is not None and plan.heal_lora > self.decoder.dims.hidden_size:
            raise UsageError(
                "--heal-lora asks for adapters that are larger than the weights",
                got=plan.heal_lora,
                expected=f"1 to {self.decoder.dims.hidden_size}, the model's width",
            )
        self.statistics = None if plan.statistics is None else Statistics(plan.statistics, self.digest)
        self.moments_of = None if self.statistics is None else self.statistics.moments

    def check_tokenizer(self) -> None:
        """Say it now rather than after the work, if the bundle will not be able to read and write text.

        Raises:
            UsageError: tokenizer.json is no tokenizer.
        """
        path = self.checkpoint.path / TOKENIZER_FILE
        if path.exists():
            read_tokenizer(path)
        else:
            self.progress.note(
                f"the checkpoint has no {TOKENIZER_FILE}: the bundle will take and give token ids only"
            )

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)

    def windows(self) -> Tensor:
        """Calibration windows [N, length] int64."""
        cached = self.decoder.layers[0].attention.k.weight.shape[0]
        if self.statistics is not None:
            return self.statistics.windows
        recipe = self.plan.recipe
        steps = sampling_steps(self.decoder, recipe.samples, recipe.length) if recipe.source == "self" else 0
        with (
            self.timed("text"),
            self.progress.stage("Sampling calibration text" if steps else "Reading text", steps),
        ):
            windows = calibration_windows(self.decoder, self.checkpoint.path, recipe, self.progress.advance)
        if len(windows) < recipe.samples:
            self.progress.note(
                f"the calibration text fills {len(windows)} windows of the {recipe.samples} asked for"
            )
        if self.compresses:
            note_little_text(windows, cached, self.progress)
        return windows

    def calibration(self) -> dict[str, Any]:
        """What the manifest says of calibration."""
        if self.statistics is not None:
            return {
                **self.statistics.header["recipe"],
                "tokens_sha256": self.statistics.header["tokens_sha256"],
            }
        return self.plan.recipe.to_json()

    def plan_compression(self, windows: Tensor, capacity: int) -> CompressionPlan:
        """What each layer is to cache."""
        with self.timed("survey"):
            return plan_compression(
                self.decoder,
                windows,
                self.plan.request,
                self.methods,
                self.moments_of,
                capacity,
                self.progress,
            )

    def convert(
        self,
        windows: Tensor,
        choice: CompressionPlan,
        take: Callable[[Layer], None],
        capacity: int,
        output: Path,
    ) -> BuildReport:
        """Hand every converted layer to `take`, healed if that is asked for, and say what became of all."""
        decoder = self.decoder
        conversion: Conversion | None = None
        layers: Iterator[ConvertedLayer] = unconverted_layers(decoder)
        if self.compresses:
            layers = conversion = convert(decoder, windows, choice.layer_plans, self.moments_of, capacity)
        heals = self.plan.heal is not None and conversion is not None
        reports: list[LayerReport] = []
        kept: list[Layer] = []
        parameters = sum(
            t.numel()
            for t in tensors_of(decoder.embedding) + tensors_of(decoder.final_norm) + tensors_of(decoder.head)
        )
        with self.timed("convert"), self.progress.stage("Converting layers", len(decoder.layers)):
            for converted in layers:
                (kept.append if heals else take)(converted.layer)
                reports.append(converted.report)
                parameters += sum(tensor.numel() for tensor in tensors_of(converted.layer))
                del converted
                return_freed()
                self.progress.advance()
            divergence = None if conversion is None else conversion.divergence()
        converted_width, frontier = sum(each.kv_width for each in reports), list[FrontierPoint]()
        for point in choice.points:
            tried = (
                divergence.mean_kl
                if divergence is not None and point.kv_width == converted_width
                else point.measured_kl
            )
            frontier.append(FrontierPoint(BYTES[self.plan.dtype] * point.kv_width, point.predicted_kl, tried))
        healing = None
        if heals:
            with self.timed("heal"):
                healed = self._heal(kept, windows, output)
            healing, divergence = (
                healed.report,
                divergence_of(decoder, healed.decoder, windows[split_windows(len(windows))[1]]),
            )
            for layer in healed.decoder.layers:
                take(layer)
        size = BYTES[self.plan.dtype]
        return BuildReport(
            source=self.checkpoint.path.resolve().name,
            layers=reports,
            kv_bytes_per_token=size * sum(each.kv_width for each in reports),
            kv_bytes_per_token_original=size * sum(each.original_kv_width for each in reports),
            parameters=parameters,
            parameters_original=parameters
            - sum(each.parameters - each.original_parameters for each in reports),
            divergence=divergence,
            seconds=self.seconds,
            healing=healing,
            frontier=frontier,
        )

    def _heal(self, layers: list[Layer], windows: Tensor, output: Path) -> Healed:
        """The converted layers healed; work that a kill ended is taken up again from beside the output."""
        assert self.plan.heal is not None
        seen = windows[split_windows(len(windows))[0]]  # what is held out from it all judges the end
        fitted, watched = (seen[each] for each in split_windows(len(seen)))
        options, state = (
            HealOptions(self.plan.heal, lora_rank=self.plan.heal_lora),
            Path(f"{output.resolve()}.healing"),
        )
        converted = replace(self.decoder, layers=layers)
        healed = heal(self.decoder, converted, fitted, watched, options, self.progress, state)
        state.unlink(missing_ok=True)
        return healed


def note_little_text(windows: Tensor, cached: int, progress: Progress) -> None:
    """Say what calibration windows [N, length] are too few for, where keys are of `cached` numbers."""
    if windows.numel() < 4 * cached:
        progress.note(
            f"{windows.numel()} calibration tokens are few for keys of {cached} numbers: the errors predicted from them are "
            "too low, and the loss will be larger than it need be; use more --samples or a larger --length"
        )
    if len(windows) == 1:
        progress.note(
            "the one calibration window is fitted and judged alike: nothing is held out; use --samples 2 or more"
        )


def capacity_of(decoder: Decoder, wanted: int | None = None) -> int:
    """Tokens that a sequence may hold: as many as wanted, or as the model has positions for, at most 4096.

    Raises:
        UsageError: more than the model has positions for, or none.
    """
    most = decoder.dims.max_positions or wanted or _DEFAULT_CAPACITY
    if wanted is None:
        return min(most, _DEFAULT_CAPACITY)
    if not 1 <= wanted <= most:
        raise UsageError(
            "--capacity is out of range",
            got=wanted,
            expected=f"1 to {most} (the model's max_position_embeddings)",
            fix="choose a capacity in that range",
        )
    return wanted
