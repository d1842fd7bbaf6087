"""The stages that `build`, `compress` and `calibrate` share: from reading the checkpoint to healing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from kvexport.build.analysis import SensitivityAnalysis
from kvexport.build.expected_times import expected_times
from kvexport.build.model_limits import (
    fitted_recipe,
    note_little_text,
    require_healing,
    require_same_capacity,
    sequence_capacity,
)
from kvexport.build.options import BuildOptions
from kvexport.build.report import BuildReport, FrontierPoint
from kvexport.build.saved_stages import SavedStages
from kvexport.build.source_weights import SourceWeights
from kvexport.build.stages import Stages
from kvexport.build.weight_analysis import STAGE as WEIGHT_STAGE
from kvexport.build.weight_analysis import WeightAnalysisStage
from kvexport.bundle import BYTES
from kvexport.calibrate import StatisticsSource, calibration_windows, sampling_steps
from kvexport.calibrate.peaks import PEAK_TOKENS
from kvexport.calibrate.text import read_tokenizer
from kvexport.convert import (
    CompressionPlan,
    LayerReport,
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
from kvexport.files.malloc import return_freed
from kvexport.heal import HealOptions, HealResult, heal
from kvexport.model.architecture import read_architecture
from kvexport.model.checkpoint import Checkpoint
from kvexport.model.decoder import Layer, parameters_of
from kvexport.model.divergence import Divergence
from kvexport.model.loader import load_decoder
from kvexport.model.placement import CPU, device_name, move, place, resolve_device
from kvexport.model.quantized.formats import stored_format
from kvexport.model.tokenizer_json import NoTokenizer, tokenizer_json
from kvexport.progress import Progress
from kvexport.validate.evaluate import divergence_of


class ConversionJob:
    """Takes one checkpoint through the stages, in this order: read (on construction), calibrate, plan,
    convert.

    Planning runs the sensitivity analysis if the request leaves a choice; conversion includes healing.

    Attributes:
        options: the options, fitted to the model.
        progress: shows stages and notes.
        checkpoint, decoder: the source.
        device: the device on which PyTorch computes.
        placed: the decoder on that device.
        digest: SHA-256 of the checkpoint.
        capacity: maximum sequence length in tokens.
        windows: sliding window of each layer in tokens; None: full attention.
        rope_switches: numbers of tokens beyond which RoPE has other frequencies.
        methods: the compression methods that a layer may be given.
        compresses: whether any layer is converted.
        uses_text: whether the result depends on the calibration text.
        tokenizer: text of tokenizer.json, set by `check_tokenizer`; None: there is no tokenizer.
        stages: the finished stages, with their wall times.
        saved: results of earlier stages that need not be computed.
        analysis: the sensitivity analysis.
        weight_analysis: the analysis of integer weights.
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
        codes: bool = False,
    ) -> None:
        """Read the checkpoint, and check the options against the model.

        Args:
            output: where the result will be written; healing keeps its state beside it. None: nowhere.
            capacity: default: the model's maximum, at most 4096.
            all_text: whether the whole calibration text is needed even if nothing is compressed.
            codes: whether linear maps of a quantised checkpoint have the codes that it has; else they are
                dequantised, with a note.

        Raises:
            CheckpointError: the checkpoint is not a readable decoder of a supported family.
            UsageError: the options do not fit the model.
            CannotRunHere: PyTorch cannot use the device.
        """
        self.options, self.progress = options, progress
        self.device = resolve_device(options.device)
        self.stages = Stages(progress)
        self.checkpoint = Checkpoint(checkpoint)
        with self.stages.timed("read"), progress.stage("Reading the checkpoint", 0):
            architecture = read_architecture(self.checkpoint.config)
            self.windows = [kind.window for kind in architecture.layers]
            ropes = [kind.rope for kind in architecture.layers if kind.rope is not None]
            self.rope_switches = {each.switches_at for each in ropes if each.switches_at is not None}
            self.capacity = sequence_capacity(architecture.max_positions, capacity)
            self.decoder = load_decoder(self.checkpoint, context=self.capacity, codes=codes)
            self.placed = place(self.decoder, self.device)
            attention = self.decoder.layers[0].attention
            self.digest = self.checkpoint.digest()
        stored = stored_format(self.checkpoint.config)
        self._dequantized = None if stored is None or codes else SourceWeights(stored.name)
        if self._dequantized is not None:
            progress.note(self._dequantized.note)
        if options.statistics is None:
            recipe = fitted_recipe(options.recipe, self.placed, checkpoint, progress)
            self.options = replace(options, recipe=recipe)
        # where nothing is compressed no method is refused
        copies = fixed_shape(options.request, (), attention) == trained_shape(attention)
        self.methods = methods_for(BEST if copies else options.method, attention)
        self.compresses = fixed_shape(options.request, self.methods, attention) != trained_shape(attention)
        hidden_size = self.decoder.dims.hidden_size
        require_healing(options.heal, options.heal_lora, hidden_size, compresses=self.compresses)
        self.uses_text = self.compresses or all_text
        if not self.uses_text:  # the text is for validation and the self-test only
            recipe = self.options.recipe
            samples = min(recipe.samples, max(1, PEAK_TOKENS // recipe.length))
            self.options = replace(self.options, recipe=replace(recipe, samples=samples))
        source = self.statistics_source()
        self.saved = SavedStages(self.options, self.checkpoint, source, self.placed, self.progress)
        given = None if options.statistics is None else self.saved.statistics
        if given is not None and self.rope_switches:
            require_same_capacity(given.capacity, self.capacity)
        self.analysis = SensitivityAnalysis(self.placed, self.capacity, self.saved, self.stages, progress)
        self.weight_analysis = WeightAnalysisStage(
            self.placed, self.options, self.saved, self.stages, progress
        )
        self._healing_state = None if output is None else Path(f"{output.resolve()}.healing")

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

    def calibrate(self) -> Tensor:
        """Sample or read the calibration windows [N, length] int64, or load those of saved statistics."""
        if self.saved.statistics is not None:
            self.stages.reused.append("text")
            windows = self.saved.statistics.windows
            if self.options.statistics is None:
                self._note_little_text(windows)
            return windows
        recipe = self.options.recipe
        steps = sampling_steps(self.decoder, recipe.sampled_windows, recipe.length)
        name = "Sampling calibration text" if steps else "Reading calibration text"
        with self.stages.timed("text"), self.progress.stage(name, steps):
            windows = calibration_windows(self.placed, self.checkpoint.path, recipe, self.progress.advance)
        self.saved.save_tokens(windows)
        self._note_little_text(windows)
        return windows

    def _note_little_text(self, windows: Tensor) -> None:
        # the keys are not fitted where nothing is compressed
        key_width = self.decoder.layers[0].attention.k.weight.shape[0] if self.compresses else None
        note_little_text(windows, self.options.recipe.samples, key_width, self.progress)

    def calibration_record(self) -> dict[str, Any]:
        """The recipe of the calibration text and the device of the conversion, for the manifest."""
        record, device = self.options.recipe.to_json(), {"device": device_name(self.device)}
        saved = self.saved.statistics
        if self.options.statistics is None or saved is None:
            return record | device
        return saved.recipe.to_json() | {"tokens_sha256": saved.tokens_sha256} | device

    def plan_compression(self, windows: Tensor, folder: Path | None = None) -> CompressionPlan:
        """Choose the method and the shape of each layer, by its sensitivity if the request leaves a choice.

        Args:
            windows: calibration windows [N, length] int64.
            folder: for temporary files [default: the system's temporary folder].
        """
        request, attention = self.options.request, self.decoder.layers[0].attention
        sizes = sizes_to_analyze(request, self.methods, attention)
        del attention  # its layer need not stay in memory
        layers = self.analysis.for_methods(windows, self.methods, sizes, folder) if sizes else None
        with self.stages.timed("trials") if self._tries else nullcontext():
            return plan_compression(
                self.placed,
                windows,
                request,
                self.methods,
                self.saved.moments_of(windows),
                self.capacity,
                self.progress,
                layers,
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
        saved, skipped = self.saved.statistics, set[str]()
        if saved is not None:
            skipped.add("text")
        if not analyzes or self.analysis.is_saved:
            skipped.add("analysis")
        if not self.weight_analysis.is_needed or self.weight_analysis.is_saved:
            skipped.add(WEIGHT_STAGE)
        if not self._tries:
            skipped.add("trials")
        if self.options.heal is None:
            skipped.add("heal")
        recipe = self.options.recipe
        samples, length = (recipe.samples, recipe.length) if saved is None else saved.windows.shape
        times = expected_times(
            recipe.sampled_windows,
            samples,
            length,
            compresses=self.compresses,
            heal_steps=self.options.heal or 0,
        )
        self.progress.plan({part: times[part] for part in parts if part not in skipped})

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
            moments_of = self.saved.moments_of(windows)
            conversion = convert(self.placed, windows, plan.layer_plans, moments_of, self.capacity)
        converted_layers = unconverted_layers(self.decoder) if conversion is None else conversion
        heals = self.options.heal is not None
        unhealed: list[Layer] = []
        reports: list[LayerReport] = []
        parameters = parameters_of(replace(self.decoder, layers=()))
        with self.stages.timed("convert"), self.progress.stage("Converting layers", len(self.decoder.layers)):
            for converted in converted_layers:
                if heals:
                    unhealed.append(converted.layer)
                else:
                    add_layer(move(converted.layer, CPU))
                reports.append(converted.report)
                parameters += parameters_of(converted.layer)
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
            seconds=self.stages.seconds,
            reused=self.stages.reused,
            healing=healing,
            frontier=frontier,
            device=device_name(self.device),
            calibration=self.calibration_record() if self.uses_text else None,
            source_weights=self._dequantized,
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
        with self.stages.timed("heal"):
            healed = heal(
                self.placed, converted, fitted, watched, options, self.progress, self._healing_state
            )
        if self._healing_state is not None:
            self._healing_state.unlink(missing_ok=True)
        return healed
