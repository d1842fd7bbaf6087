"""The stages that `build`, `compress` and `calibrate` share: from reading the checkpoint to healing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from kvexport.build.analysis import analyzed_sizes, of_methods
from kvexport.build.expected_times import expected_times
from kvexport.build.options import BuildOptions
from kvexport.build.report import BuildReport, FrontierPoint
from kvexport.build.stage_cache import CacheWriter, StageCache, cache_key
from kvexport.bundle import BYTES
from kvexport.calibrate import (
    Moments,
    Recipe,
    Statistics,
    StatisticsSource,
    StatisticsWriter,
    calibration_windows,
    sampling_steps,
    usable_recipe,
)
from kvexport.calibrate.peaks import TOKENS
from kvexport.calibrate.text import read_tokenizer
from kvexport.convert import (
    CompressionPlan,
    LayerReport,
    LayerSensitivity,
    analyze_sensitivity,
    convert,
    fixed_shape,
    methods_for,
    plan_compression,
    require_ratio,
    sizes_to_analyze,
    split_windows,
    trained_shape,
    unconverted_layers,
)
from kvexport.convert.method_names import BEST
from kvexport.errors import UsageError
from kvexport.files.cache_folder import CacheFolder
from kvexport.files.malloc import return_freed
from kvexport.heal import HealOptions, HealResult, heal
from kvexport.model.architecture import read_architecture
from kvexport.model.checkpoint import Checkpoint
from kvexport.model.decoder import Decoder, Layer, tensors_of
from kvexport.model.divergence import Divergence
from kvexport.model.loader import load_decoder
from kvexport.model.placement import CPU, device_name, move, place, resolve_device
from kvexport.model.tokenizer_json import NoTokenizer, tokenizer_json
from kvexport.progress import Progress
from kvexport.validate.evaluate import divergence_of

_DEFAULT_CAPACITY = 4096  # if the model's maximum is larger, or it has none


class ConversionJob:
    """Converts one checkpoint, and measures the time of each stage.

    Attributes:
        checkpoint, decoder: the source.
        device: the device on which PyTorch computes.
        placed: the decoder on that device.
        digest: SHA-256 of the checkpoint.
        capacity: maximum sequence length in tokens.
        windows: sliding window of each layer in tokens; None: full attention.
        rope_switches: numbers of tokens beyond which RoPE has other frequencies.
        methods: the compression methods that a layer may be given.
        compresses: whether any layer is converted.
        tokenizer: text of tokenizer.json, set by `check_tokenizer`; None: there is no tokenizer.
        seconds: wall time of each finished stage, in seconds.
        reused: stages whose saved results were used.
    """

    tokenizer: str | None = None

    def __init__(
        self,
        checkpoint: Path,
        output: Path | None,
        options: BuildOptions,
        progress: Progress,
        capacity: int | None = None,
        *,
        all_text: bool = False,
    ) -> None:
        """Read the checkpoint, and check the options against the model.

        Args:
            output: where the result will be written; healing keeps its state beside it. None: nowhere.
            capacity: default: the model's maximum, at most 4096.
            all_text: whether the whole calibration text is needed even if nothing is compressed.

        Raises:
            CheckpointError: the checkpoint is not a readable decoder of a supported family.
            UsageError: the options do not fit the model.
            CannotRunHere: PyTorch cannot use the device.
        """
        self.options, self.progress = options, progress
        self.device = resolve_device(options.device)
        self.seconds: dict[str, float] = {}
        self.reused: list[str] = []
        self.checkpoint = Checkpoint(checkpoint)
        with self.timed("read"), progress.stage("Reading the checkpoint", 0):
            architecture = read_architecture(self.checkpoint.config)
            self.windows = [kind.window for kind in architecture.layers]
            ropes = [kind.rope for kind in architecture.layers if kind.rope is not None]
            self.rope_switches = {each.switches_at for each in ropes if each.switches_at is not None}
            self.capacity = sequence_capacity(architecture.max_positions, capacity)
            self.decoder = load_decoder(self.checkpoint, context=self.capacity)
            self.placed = place(self.decoder, self.device)
            attention = self.decoder.layers[0].attention
            self.digest = self.checkpoint.digest()
        if options.statistics is None:
            recipe = fitted_recipe(options.recipe, self.placed, checkpoint, progress)
            self.options = replace(options, recipe=recipe)
        # where nothing is compressed no method is refused
        copies = fixed_shape(options.request, (), attention) == trained_shape(attention)
        self.methods = methods_for(BEST if copies else options.method, attention)
        self.compresses = fixed_shape(options.request, self.methods, attention) != trained_shape(attention)
        self._check_healing()
        if not self.compresses and not all_text:  # the text is for validation and the self-test only
            recipe = self.options.recipe
            samples = min(recipe.samples, max(1, TOKENS // recipe.length))
            self.options = replace(self.options, recipe=replace(recipe, samples=samples))
        self._open_saved_stages()
        self._healing_state = None if output is None else Path(f"{output.resolve()}.healing")

    def _open_saved_stages(self) -> None:
        """Find the stages that are finished: in the statistics that the user gives, else in the cache."""
        options, self._cache = self.options, None
        if options.statistics is not None:
            self._statistics: Statistics | None = Statistics(options.statistics, self.digest)
            self._check_capacity(self._statistics.capacity)
            return
        self._statistics = None
        if options.cache is not None:
            source = self.statistics_source()
            try:
                key = cache_key(self.checkpoint, source, self.device.type)
            except OSError:  # the stage that needs the file says which
                return
            self._cache = StageCache(CacheFolder(options.cache), key, source, self.progress)
            self._statistics = self._cache.find()

    def _check_healing(self) -> None:
        steps, rank, width = self.options.heal, self.options.heal_lora, self.decoder.dims.hidden_size
        if steps is not None and not self.compresses:
            raise UsageError(
                "--heal needs compressed layers, and all KV heads are kept",
                got=f"--heal {steps}",
                fix="lower --kv-ratio or --kv-heads, or leave out --heal",
            )
        if rank is not None and rank > width:
            raise UsageError(
                "--heal-lora must not exceed the model's hidden size", got=rank, expected=f"1 to {width}"
            )

    def _check_capacity(self, capacity: int) -> None:
        """
        Args:
            capacity: of saved statistics.

        Raises:
            UsageError: statistics for another capacity have other RoPE frequencies.
        """
        if self.rope_switches and capacity != self.capacity:
            raise UsageError(
                "the statistics must be for the capacity of the build: the model's RoPE frequencies depend "
                "on it",
                got=f"statistics for {capacity} tokens",
                expected=f"statistics for {self.capacity} tokens",
                fix=f"kvexport calibrate CHECKPOINT -o STATISTICS --capacity {self.capacity}",
            )

    def check_ratio(self) -> None:
        """
        Raises:
            UsageError: no shape of the layers is as small as the requested fraction of the cache.
        """
        require_ratio(self.options.request, self.methods, self.decoder.layers[0].attention)

    def check_tokenizer(self) -> None:
        """Check the tokenizer before the work starts, and convert it to tokenizer.json if necessary.

        Raises:
            UsageError: tokenizer.json is damaged.
        """
        try:
            read_tokenizer(self.checkpoint.path)
            self.tokenizer = tokenizer_json(self.checkpoint.path)
        except NoTokenizer as error:
            details = "" if error.got is None else f" ({error.got})"
            self.progress.note(
                f"{error.what}{details}: the bundle takes and returns token ids only; {error.fix}"
            )

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Measure the wall time of a stage, which is a part of the plan of the progress."""
        start = time.perf_counter()
        with self.progress.part(stage):
            yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)

    def calibrate(self) -> Tensor:
        """Sample or read the calibration windows [N, length] int64, or load those of saved statistics."""
        if self._statistics is not None:
            self.reused.append("text")
            windows = self._statistics.windows
            if self.options.statistics is None:
                self._note_little_text(windows)
            return windows
        recipe = self.options.recipe
        steps = sampling_steps(self.decoder, recipe.samples, recipe.length) if recipe.source == "self" else 0
        name = "Sampling calibration text" if steps else "Reading calibration text"
        with self.timed("text"), self.progress.stage(name, steps):
            windows = calibration_windows(self.placed, self.checkpoint.path, recipe, self.progress.advance)
        if self._cache is not None:
            self._cache.save_tokens(windows)
        self._note_little_text(windows)
        return windows

    def _note_little_text(self, windows: Tensor) -> None:
        samples = self.options.recipe.samples
        if len(windows) < samples:
            self.progress.note(
                f"the calibration text has {len(windows)} windows, fewer than the {samples} requested"
            )
        if self.compresses:
            warn_about_little_text(windows, self.decoder.layers[0].attention.k.weight.shape[0], self.progress)

    def calibration_record(self) -> dict[str, Any]:
        """The recipe of the calibration text and the device of the conversion, for the manifest."""
        record, device = self.options.recipe.to_json(), {"device": device_name(self.device)}
        if self.options.statistics is None or self._statistics is None:
            return record | device
        tokens = {"tokens_sha256": self._statistics.tokens_sha256}
        return self._statistics.header["recipe"] | tokens | device

    def moments_of(self) -> Callable[[int], Moments] | None:
        """Reads the saved moments of a layer; None: there are none."""
        saved = self._statistics
        return saved.moments if saved is not None and saved.has_moments(len(self.decoder.layers)) else None

    def plan_compression(self, windows: Tensor, folder: Path | None = None) -> CompressionPlan:
        """Choose the method and the shape of each layer, by its sensitivity if the request leaves a choice.

        Args:
            windows: calibration windows [N, length] int64.
            folder: for temporary files [default: the system's temporary folder].
        """
        request, attention = self.options.request, self.decoder.layers[0].attention
        sizes = sizes_to_analyze(request, self.methods, attention)
        del attention  # its layer need not stay in memory
        layers = self._sensitivity(windows, sizes, folder) if sizes else []
        with self.timed("trials") if self._tries else nullcontext():
            return plan_compression(
                self.placed,
                windows,
                request,
                self.methods,
                self.moments_of(),
                self.capacity,
                self.progress,
                lambda _: layers,
            )

    @property
    def _tries(self) -> bool:
        """Whether conversions are tried in search of the size of the cache."""
        return self.compresses and self.options.request.max_kl is not None

    def plan_progress(self, parts: Sequence[str], *, analyzes: bool = False) -> None:
        """Announce the parts that are left to the progress.

        Args:
            parts: stages of the command, of which those are left out that this job skips.
            analyzes: whether the sensitivity is analysed even if the request leaves no choice.
        """
        if "analysis" in parts and not analyzes:
            attention = self.decoder.layers[0].attention
            analyzes = bool(sizes_to_analyze(self.options.request, self.methods, attention))
        saved, skipped = self._statistics, set[str]()
        if saved is not None:
            skipped.add("text")
            analyzes &= not saved.has_sensitivity(len(self.decoder.layers)) or saved.capacity != self.capacity
        if not analyzes:
            skipped.add("analysis")
        if not self._tries:
            skipped.add("trials")
        if self.options.heal is None:
            skipped.add("heal")
        recipe = self.options.recipe
        samples, length = (recipe.samples, recipe.length) if saved is None else saved.windows.shape
        times = expected_times(
            recipe.source,
            samples,
            length,
            compresses=self.compresses,
            heal_steps=self.options.heal or 0,
        )
        self.progress.plan({part: times[part] for part in parts if part not in skipped})

    def _sensitivity(
        self, windows: Tensor, sizes: Sequence[int], folder: Path | None
    ) -> list[LayerSensitivity]:
        """Sensitivity of each layer for the job's methods and at least these group sizes."""
        attention = self.decoder.layers[0].attention
        if not set(sizes) <= set(
            analyzed_sizes(attention)
        ):  # --group-size beyond what is analysed by default
            with self.timed("analysis"):
                return analyze_sensitivity(
                    self.placed,
                    windows,
                    self.methods,
                    sizes,
                    moments_of=self.moments_of(),
                    capacity=self.capacity,
                    progress=self.progress,
                    folder=folder,
                )
        return [of_methods(layer, self.methods) for layer in self.analyze(windows, folder)]

    def analyze(
        self, windows: Tensor, folder: Path | None, writer: StatisticsWriter | None = None
    ) -> list[LayerSensitivity]:
        """Sensitivity of each layer for all methods and group sizes, saved or analysed now.

        It does not depend on the requested size of the cache, so that one analysis serves every request.

        Args:
            windows: calibration windows [N, length] int64.
            folder: for temporary files; None: the system's temporary folder.
            writer: receives moments and sensitivities.
        """
        count, saved = len(self.decoder.layers), self._statistics
        if saved is not None and saved.has_sensitivity(count):
            if saved.capacity == self.capacity:
                self.reused.append("analysis")
                return _read_analysis(saved, count, writer)
            self.progress.note(
                f"the statistics are for a capacity of {saved.capacity} tokens: the sensitivities are "
                f"analysed again for {self.capacity}"
            )
        with self.timed("analysis"), ExitStack() as stack:
            writers: list[StatisticsWriter | CacheWriter] = [] if writer is None else [writer]
            if self._cache is not None:
                writers.append(stack.enter_context(self._cache.writer(windows, count)))
            layers = self._analyze(windows, folder, writers)
        if self._cache is not None:
            self._statistics = self._cache.find()  # the conversion reads the moments
        return layers

    def _analyze(
        self, windows: Tensor, folder: Path | None, writers: Sequence[StatisticsWriter | CacheWriter]
    ) -> list[LayerSensitivity]:
        def save_moments(index: int, moments: Moments) -> None:
            for writer in writers:
                writer.save_moments(index, moments)

        attention = self.decoder.layers[0].attention
        methods, sizes = methods_for(BEST, attention), analyzed_sizes(attention)
        del attention  # its layer need not stay in memory
        layers = analyze_sensitivity(
            self.placed,
            windows,
            methods,
            sizes,
            moments_of=self.moments_of(),
            save_moments=save_moments,
            capacity=self.capacity,
            progress=self.progress,
            folder=folder,
        )
        for index, layer in enumerate(layers):
            for writer in writers:
                writer.save_sensitivity(index, layer.tensors())
        return layers

    def statistics_source(self) -> StatisticsSource:
        """What the statistics of this job are measured on."""
        name = self.checkpoint.path.resolve().name
        return StatisticsSource(self.digest, name, self.options.recipe, self.capacity)

    def convert(
        self, windows: Tensor, plan: CompressionPlan, add_layer: Callable[[Layer], None]
    ) -> BuildReport:
        """Convert all layers, heal them if requested, and pass each to `add_layer` on the CPU, first layer
        first.

        Without healing only one layer is in memory at a time.
        """
        conversion = None
        if self.compresses:
            conversion = convert(self.placed, windows, plan.layer_plans, self.moments_of(), self.capacity)
        converted_layers = unconverted_layers(self.decoder) if conversion is None else conversion
        heals = self.options.heal is not None
        unhealed: list[Layer] = []
        reports: list[LayerReport] = []
        parameters = _parameters_outside_layers(self.decoder)
        with self.timed("convert"), self.progress.stage("Converting layers", len(self.decoder.layers)):
            for converted in converted_layers:
                if heals:
                    unhealed.append(converted.layer)
                else:
                    add_layer(move(converted.layer, CPU))
                reports.append(converted.report)
                parameters += _count(tensors_of(converted.layer))
                del converted  # frees the layer before the next one is read
                return_freed()
                self.progress.advance()
            divergence = None if conversion is None else conversion.divergence()
        frontier = self._frontier(plan, reports, divergence)
        healing = None
        if heals:
            healed = self._heal(unhealed, windows)
            healing = healed.report
            held_out = windows[split_windows(len(windows))[1]]
            divergence = divergence_of(self.placed, healed.decoder, held_out)
            for layer in healed.decoder.layers:
                add_layer(move(layer, CPU))
        number_bytes = BYTES[self.options.dtype]
        return BuildReport(
            source=self.checkpoint.path.resolve().name,
            layers=reports,
            kv_bytes_per_token=number_bytes * sum(report.kv_width for report in reports),
            kv_bytes_per_token_original=number_bytes * sum(report.original_kv_width for report in reports),
            parameters=parameters,
            parameters_original=parameters
            - sum(report.parameters - report.original_parameters for report in reports),
            divergence=divergence,
            seconds=self.seconds,
            reused=self.reused,
            healing=healing,
            frontier=frontier,
            device=device_name(self.device),
            calibration=self.calibration_record() if self.compresses else None,
        )

    def _frontier(
        self, plan: CompressionPlan, reports: list[LayerReport], divergence: Divergence | None
    ) -> list[FrontierPoint]:
        """The plan's points, the converted one with its measured loss."""
        converted_width = sum(report.kv_width for report in reports)
        points = []
        for point in plan.points:
            measured_kl = point.measured_kl
            if divergence is not None and point.kv_width == converted_width:
                measured_kl = divergence.mean_kl
            kv_bytes = BYTES[self.options.dtype] * point.kv_width
            points.append(FrontierPoint(kv_bytes, point.predicted_kl, measured_kl))
        return points

    def _heal(self, layers: list[Layer], windows: Tensor) -> HealResult:
        """Distil the converted layers; an earlier run that was killed is resumed from its state file."""
        assert self.options.heal is not None
        train = windows[split_windows(len(windows))[0]]  # the others measure the final loss
        fitted, watched = (train[part] for part in split_windows(len(train)))
        options = HealOptions(self.options.heal, lora_rank=self.options.heal_lora)
        converted = replace(self.placed, layers=layers)
        with self.timed("heal"):
            healed = heal(
                self.placed, converted, fitted, watched, options, self.progress, self._healing_state
            )
        if self._healing_state is not None:
            self._healing_state.unlink(missing_ok=True)
        return healed


def _read_analysis(saved: Statistics, count: int, writer: StatisticsWriter | None) -> list[LayerSensitivity]:
    """Saved sensitivities of `count` layers; `writer` receives a copy, and the moments."""
    layers = []
    for index in range(count):
        tensors = saved.sensitivity(index)
        layers.append(LayerSensitivity.from_tensors(tensors))
        if writer is not None:
            writer.save_moments(index, saved.moments(index))
            writer.save_sensitivity(index, tensors)
    return layers


def fitted_recipe(recipe: Recipe, decoder: Decoder, checkpoint: Path, progress: Progress) -> Recipe:
    """The recipe with windows that the model has positions for, and with text that it can predict.

    A note says what was changed.
    """
    recipe = usable_recipe(recipe, decoder, checkpoint)
    if recipe.reason is not None:
        progress.note(f"calibration text is sampled from the model, because {recipe.reason}")
    fitted = recipe.fitted(decoder.dims.max_positions)
    if fitted != recipe:
        progress.note(
            f"calibration windows have {fitted.length} tokens, not {recipe.length}: the model has no more "
            "positions"
        )
    return fitted


def sequence_capacity(most: int | None, requested: int | None = None) -> int:
    """The maximum sequence length: the requested one, or the model's, at most 4096.

    Args:
        most: maximum length that the model supports; None: unbounded.
        requested: None: the default.

    Raises:
        UsageError: the requested one is not positive, or exceeds the model's.
    """
    if requested is None:
        return min(most or _DEFAULT_CAPACITY, _DEFAULT_CAPACITY)
    if requested < 1 or (most is not None and requested > most):
        raise UsageError(
            "--capacity must be a length that the model supports",
            got=f"{requested} tokens",
            expected=">= 1" if most is None else f"1 to {most} (the positions that the model supports)",
        )
    return requested


def warn_about_little_text(windows: Tensor, key_width: int, progress: Progress) -> None:
    """Report that calibration windows [N, length] are too few to fit keys, or to hold one out.

    Args:
        key_width: numbers that the keys of one token and layer have.
    """
    if windows.numel() < 4 * key_width:
        progress.note(
            f"{windows.numel()} calibration tokens are few for keys of {key_width} numbers: the predicted "
            "errors are too low, and the loss is larger than necessary; use more --samples or a larger "
            "--length"
        )
    if len(windows) == 1:
        progress.note(
            "there is one calibration window, so no tokens are held out: the measured errors and the loss "
            "are on the text that was used to fit; use --samples 2 or more"
        )


def _parameters_outside_layers(decoder: Decoder) -> int:
    return _count(tensors_of(replace(decoder, layers=())))


def _count(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
