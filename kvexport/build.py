"""The main job in one go: checkpoint to converted, exported, validated bundle, or to a standard checkpoint.

Knows the order of the stations and what each hands to the next; every station's own knowledge stays there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvexport import __version__
from kvexport.bundle import BYTES, REPORT_FILE, TOKENIZER_FILE, new_bundle
from kvexport.bundle_manifest import kv_bytes
from kvexport.calibrate import PeakMeter, Recipe, Statistics, calibration_windows, sampling_steps, save_header, save_moments
from kvexport.calibrate.text import read_tokenizer
from kvexport.checkpoint import Checkpoint
from kvexport.convert import (
    Choice,
    Conversion,
    ConvertedLayer,
    LayerReport,
    Way,
    Wish,
    choose,
    convert,
    fixed_shape,
    measure,
    methods_for,
    require_ratio,
    split,
    trained_shape,
    unconverted,
    uniform_shape,
)
from kvexport.decoder import Decoder, Layer, tensors_of
from kvexport.directory import atomic_directory, require_output
from kvexport.divergence import Divergence
from kvexport.errors import GateFailed, UsageError
from kvexport.eviction import Eviction, EvictionWish
from kvexport.graph import GRAPH_FILE, DecoderWriter, Kept, write_lowered
from kvexport.heal import Healed, HealOptions, HealReport, heal
from kvexport.loading import load_decoder
from kvexport.memory import return_freed
from kvexport.overflow import kept_float32
from kvexport.progress import Progress
from kvexport.standard import StandardWriter, require_standard
from kvexport.validate import TwinRecorder, ValidationReport, prove
from kvexport.validate.cost import divergence_of

if TYPE_CHECKING:
    from kvexport.graph import GraphContract

_DEFAULT_CAPACITY = 4096  # where the model's own limit is larger, or it has none


@dataclass(frozen=True)
class Plan:
    """What to make of a checkpoint.

    Attributes:
        method: a name of `METHOD_NAMES`.
        wish: how much is to be cached.
        recipe: where calibration text comes from, unless `statistics` (saved by `calibrate`) are given.
        dtype: of weights and cache in what is written.
        eviction: how the cache stays within a budget of tokens; None: it holds all.
        heal: steps of distillation after conversion; None: none.
        heal_lora: rank of the adapters to heal with, in place of the whole weights.
    """

    recipe: Recipe
    wish: Wish = field(default_factory=Wish)
    method: str = "auto"
    statistics: Path | None = None
    dtype: str = "float32"
    eviction: EvictionWish | None = None
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


def build(
    checkpoint: Path, output: Path, plan: Plan, progress: Progress, *, capacity: int | None = None, force: bool = False
) -> BuildReport:
    """Calibrate, convert, export, prove: the bundle at `output` appears whole, or not at all.

    Raises:
        UsageError: the checkpoint, the plan or the output cannot be used.
        GateFailed: the exported graph is not its PyTorch twin; no bundle is left.
        CannotRunHere: this machine lacks memory, disk or a package.
    """
    with new_bundle(output, force=force) as writer:
        job = _Job(checkpoint, plan, progress)
        require_ratio(plan.wish, job.methods, job.decoder.layers[0].attention)
        job.check_tokenizer()
        decoder, limit = job.decoder, capacity_of(job.decoder, capacity)
        eviction = None if plan.eviction is None else plan.eviction.of(limit, len(decoder.layers))
        windows = job.windows()
        choice = job.choose(windows, limit)
        twin = TwinRecorder(decoder, windows, limit, eviction)
        graph = DecoderWriter(
            writer.directory,
            dtype=plan.dtype,
            capacity=limit,
            limits=decoder.limits,
            embedding=decoder.embedding,
            rope=decoder.rope,
            eviction=eviction,
        )

        peaks = PeakMeter(decoder, windows) if plan.dtype == "float16" else None

        def take(layer: Layer) -> None:
            twin.add_layer(layer)
            graph.add_layer(layer)
            if peaks is not None:
                peaks.add_layer(layer)

        report = job.convert(windows, choice, take, limit, output)
        report.eviction, report.capacity = eviction, limit
        report.kv_bytes_at_capacity = kv_bytes(report.layers, plan.dtype, eviction, limit)
        twin.save(writer.directory)
        kept = Kept() if peaks is None else kept_float32(peaks)
        if kept.names:
            report.kept_float32 = kept.names
            progress.note(f"float16 cannot hold all numbers of this model: kept in float32: {', '.join(kept.names)}")
        contract = graph.finish(decoder.final_norm, decoder.head, kept)
        write_lowered(writer.directory / GRAPH_FILE, plan.dtype)
        job.checkpoint.copy_tokenizer(writer.directory)
        with job.timed("prove"):
            report.validation = prove(writer.directory, contract, progress, eviction)
        if report.validation.failures:
            rounding = f"try --dtype float32: if that passes, rounding to {plan.dtype} is more than this model takes"
            raise GateFailed(
                "the exported graph is not its PyTorch twin:\n" + "\n".join(report.validation.failures),
                fix=None if plan.dtype == "float32" else rounding,
            )
        (writer.directory / REPORT_FILE).write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
        writer.seal(_manifest(job, limit, eviction, contract, report))
    return report


def compress(checkpoint: Path, output: Path, plan: Plan, progress: Progress, *, force: bool = False) -> BuildReport:
    """Convert, and write a standard Hugging Face checkpoint.

    Raises:
        UsageError: as `build`, and where the result would not be a standard checkpoint.
    """
    require_output(output, marker="config.json", force=force)
    job = _Job(checkpoint, plan, progress)
    shape = uniform_shape(plan.wish, job.methods, job.decoder.layers[0].attention)
    require_standard(job.decoder, plan.method, shape != trained_shape(job.decoder.layers[0].attention))
    with atomic_directory(output, marker="config.json", force=force) as directory:
        writer = StandardWriter(directory, job.decoder, job.checkpoint.config, getattr(torch, plan.dtype))
        method = job.methods[0]
        if job.decoder.layers[0].attention.position == "alibi":
            if job.compresses:
                progress.note(
                    "transformers knows no shared KV heads for BLOOM: the checkpoint has each of them once for every head that "
                    "it serves, so that other programs cache as much as before; a bundle of `kvexport build` caches less"
                )
            method = replace(method, matched=False)  # heads stay where their slopes are
        choice = Choice([Way(method, shape)] * len(job.decoder.layers))
        report = job.convert(job.windows(), choice, writer.add_layer, capacity_of(job.decoder), output)
        writer.finish()
        job.checkpoint.copy_tokenizer(directory)
    return report


def calibrate(checkpoint: Path, output: Path, recipe: Recipe, progress: Progress, *, force: bool = False) -> int:
    """Write statistics that `build` and `compress` can start from; returns how many tokens were measured."""
    require_output(output, marker="statistics.json", force=force)
    job = _Job(checkpoint, Plan(recipe), progress)
    with atomic_directory(output, marker="statistics.json", force=force) as directory:
        windows = job.windows()
        save_header(directory, job.digest, recipe, windows)
        with progress.stage("Measuring layers", len(job.decoder.layers)):
            for index, moments in enumerate(measure(job.decoder, windows)):
                save_moments(directory, index, moments)
                progress.advance()
    return windows.numel()


class _Job:
    """One checkpoint on its way through the stations, with the clock of each stage."""

    def __init__(self, path: Path, plan: Plan, progress: Progress) -> None:
        if plan.dtype not in BYTES:
            raise UsageError("--dtype is not one of those that engines take", seen=plan.dtype, allowed=", ".join(BYTES))
        self.seconds: dict[str, float] = {}
        self.plan, self.progress = plan, progress
        self.checkpoint = Checkpoint(path)
        with self.timed("read"):
            self.decoder = load_decoder(self.checkpoint)
            attention = self.decoder.layers[0].attention
            self.digest = self.checkpoint.digest()
        self.methods = methods_for(plan.method, attention)
        self.compresses = fixed_shape(plan.wish, self.methods, attention) != trained_shape(attention)
        if plan.heal is not None and not self.compresses:
            raise UsageError(
                "--heal has nothing to heal: every head stays as it was trained", seen=f"--heal {plan.heal}",
                fix="lower --kv-ratio or --kv-heads, or leave --heal out",
            )  # fmt: skip
        if plan.heal_lora is not None and plan.heal_lora > self.decoder.limits.hidden_size:
            raise UsageError(
                "--heal-lora asks for adapters that are larger than the weights", seen=plan.heal_lora,
                allowed=f"1 to {self.decoder.limits.hidden_size}, the model's width",
            )  # fmt: skip
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
            self.progress.note(f"the checkpoint has no {TOKENIZER_FILE}: the bundle will take and give token ids only")

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
        with self.timed("text"), self.progress.stage("Sampling calibration text" if steps else "Reading text", steps):
            windows = calibration_windows(self.decoder, self.checkpoint.path, recipe, self.progress.advance)
        if len(windows) < recipe.samples:
            self.progress.note(f"the calibration text fills {len(windows)} windows of the {recipe.samples} asked for")
        if self.compresses:
            note_little_text(windows, cached, self.progress)
        return windows

    def calibration(self) -> dict[str, Any]:
        """What the manifest says of calibration."""
        if self.statistics is not None:
            return {**self.statistics.header["recipe"], "tokens_sha256": self.statistics.header["tokens_sha256"]}
        return self.plan.recipe.to_json()

    def choose(self, windows: Tensor, capacity: int) -> Choice:
        """What each layer is to cache."""
        with self.timed("survey"):
            return choose(self.decoder, windows, self.plan.wish, self.methods, self.moments_of, capacity, self.progress)

    def convert(
        self, windows: Tensor, choice: Choice, take: Callable[[Layer], None], capacity: int, output: Path
    ) -> BuildReport:  # fmt: skip
        """Hand every converted layer to `take`, healed if that is asked for, and say what became of all."""
        decoder = self.decoder
        conversion: Conversion | None = None
        layers: Iterator[ConvertedLayer] = unconverted(decoder)
        if self.compresses:
            layers = conversion = convert(decoder, windows, choice.ways, self.moments_of, capacity)
        heals = self.plan.heal is not None and conversion is not None
        reports: list[LayerReport] = []
        kept: list[Layer] = []
        parameters = sum(
            t.numel() for t in tensors_of(decoder.embedding) + tensors_of(decoder.final_norm) + tensors_of(decoder.head)
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
            tried = divergence.mean_kl if divergence is not None and point.kv_width == converted_width else point.measured_kl
            frontier.append(FrontierPoint(BYTES[self.plan.dtype] * point.kv_width, point.predicted_kl, tried))
        healing = None
        if heals:
            with self.timed("heal"):
                healed = self._heal(kept, windows, output)
            healing, divergence = healed.report, divergence_of(decoder, healed.decoder, windows[split(len(windows))[1]])
            for layer in healed.decoder.layers:
                take(layer)
        size = BYTES[self.plan.dtype]
        return BuildReport(
            source=self.checkpoint.path.resolve().name,
            layers=reports,
            kv_bytes_per_token=size * sum(each.kv_width for each in reports),
            kv_bytes_per_token_original=size * sum(each.original_kv_width for each in reports),
            parameters=parameters,
            parameters_original=parameters - sum(each.parameters - each.original_parameters for each in reports),
            divergence=divergence,
            seconds=self.seconds,
            healing=healing,
            frontier=frontier,
        )

    def _heal(self, layers: list[Layer], windows: Tensor, output: Path) -> Healed:
        """The converted layers healed; work that a kill ended is taken up again from beside the output."""
        assert self.plan.heal is not None
        seen = windows[split(len(windows))[0]]  # what is held out from it all judges the end
        fitted, watched = (seen[each] for each in split(len(seen)))
        options, state = HealOptions(self.plan.heal, lora_rank=self.plan.heal_lora), Path(f"{output.resolve()}.healing")
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
        progress.note("the one calibration window is fitted and judged alike: nothing is held out; use --samples 2 or more")


def capacity_of(decoder: Decoder, wanted: int | None = None) -> int:
    """Tokens that a sequence may hold: as many as wanted, or as the model has positions for, at most 4096.

    Raises:
        UsageError: more than the model has positions for, or none.
    """
    most = decoder.limits.max_positions or wanted or _DEFAULT_CAPACITY
    if wanted is None:
        return min(most, _DEFAULT_CAPACITY)
    if not 1 <= wanted <= most:
        raise UsageError(
            "--capacity is out of range", seen=wanted, allowed=f"1 to {most} (the model's max_position_embeddings)",
            fix="choose a capacity in that range",
        )  # fmt: skip
    return wanted


def _manifest(
    job: _Job, capacity: int, eviction: Eviction | None, contract: GraphContract, report: BuildReport
) -> dict[str, Any]:  # fmt: skip
    limits = job.decoder.limits
    return {
        "kvexport": __version__,
        "source": {
            "name": report.source,
            "model_type": job.checkpoint.config["model_type"],
            "sha256": job.digest,
        },
        "calibration": job.calibration() if job.compresses else None,
        "model": {
            "vocab_size": limits.vocab_size,
            "hidden_size": limits.hidden_size,
            "num_hidden_layers": len(report.layers),
            "max_position_embeddings": limits.max_positions,
            "bos_token_id": job.decoder.bos_token_id,
            "eos_token_ids": list(job.decoder.eos_token_ids),
        },
        "dtype": job.plan.dtype,
        "capacity": capacity,
        "eviction": None if eviction is None else eviction.to_json(),
        "layers": [asdict(layer) for layer in report.layers],
        "graph": contract.to_json(),
    }
