"""Build a bundle, compress to a Hugging Face checkpoint, or save calibration statistics.

A build runs these stages: read the checkpoint, calibrate, analyze sensitivity, try conversions (with a bound
on the KL divergence), analyze weights (with weights in 4 bits), convert, heal (if requested), record the
self-test, write, validate.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from kvexport.build.bundle_export import BundleExport
from kvexport.build.conversion_job import ConversionJob
from kvexport.build.hf_checkpoint import plan_hf_checkpoint
from kvexport.build.hooks import BuildHooks
from kvexport.build.options import BuildOptions
from kvexport.build.quantization import (
    WeightQuantization,
    kept_weights,
    requested_formats,
    weight_settings,
)
from kvexport.build.read_back import ExpectedLogits, read_back
from kvexport.build.report import BuildReport, WeightBits
from kvexport.bundle import DATA_FILE, REPORT_FILE, BundleWriter, new_bundle
from kvexport.bundle.graph_io import GraphContract
from kvexport.bundle.manifest import kv_bytes
from kvexport.calibrate import Recipe, StatisticsWriter
from kvexport.calibrate.statistics import STATISTICS_FILE
from kvexport.convert import CompressionPlan
from kvexport.errors import GateFailed, UsageError
from kvexport.eviction.config import Eviction, EvictionRequest
from kvexport.files.atomic_directory import atomic_directory, require_output
from kvexport.files.malloc import return_freed
from kvexport.model.decoder import Layer
from kvexport.model.hf_writer import HFCheckpointWriter
from kvexport.model.placement import AUTO, device_computation
from kvexport.model.quantized.formats import stored_format
from kvexport.progress import Progress
from kvexport.validate import ValidationReport, validate_graph

_BUILD_STAGES = (
    "text",
    "analysis",
    "trials",
    "weight-analysis",
    "convert",
    "heal",
    "self-test",
    "write",
    "validation",
)

__all__ = ["BuildHooks", "BuildOptions", "BuildReport", "build", "calibrate", "compress"]


@device_computation()
def build(
    checkpoint: Path,
    output: Path,
    options: BuildOptions,
    progress: Progress,
    *,
    capacity: int | None = None,
    force: bool = False,
    hooks: BuildHooks | None = None,
) -> BuildReport:
    """Compress a checkpoint and export it to a validated bundle.

    The bundle appears at `output` complete, or not at all.

    Args:
        capacity: maximum sequence length in tokens; default: the model's, at most 4096.
        force: replace an existing bundle.
        hooks: functions that observe or change the build.

    Raises:
        UsageError: the checkpoint, the options or the output are not usable.
        GateFailed: the exported graph does not match its PyTorch reference.
        CannotRunHere: this machine lacks memory, disk space or a package.
    """
    hooks = hooks or BuildHooks()
    with new_bundle(output, force=force) as writer:
        fits_weights = options.quantizes and options.weight_method != "nearest"
        job = ConversionJob(
            checkpoint,
            output,
            options,
            progress,
            capacity,
            all_text=fits_weights,
            codes=options.quantizes,
        )
        job.check_ratio()
        job.check_tokenizer()
        _note_frequencies(job)
        eviction = None
        if options.eviction is not None:
            eviction = _eviction(options.eviction, job)

        job.plan_progress(_BUILD_STAGES)
        windows = job.calibrate()
        plan = hooks.plan(job.plan_compression(windows, writer.directory))
        contract, manifest, report = _write_model(job, writer, windows, plan, eviction, hooks)
        return_freed()
        with job.stages.timed("validation"):
            validation = validate_graph(
                writer.directory,
                contract,
                progress,
                eviction,
                quantized=report.weights is not None and report.weights.is_quantized,
            )
        _require_valid(validation, options.dtype)
        report = replace(report, validation=validation)
        text = json.dumps(report.to_json(), indent=1) + "\n"
        (writer.directory / REPORT_FILE).write_text(text, encoding="utf-8")
        job.saved.files.require_unchanged()
        writer.seal(manifest)
    return report


def _write_model(
    job: ConversionJob,
    writer: BundleWriter,
    windows: Tensor,
    plan: CompressionPlan,
    eviction: Eviction | None,
    hooks: BuildHooks,
) -> tuple[GraphContract, dict[str, Any], BuildReport]:
    """Convert, quantise and write the model. Its layers, embedding and head are freed on return.

    Returns:
        The graph's contract, the manifest, and the report, which lacks the validation.
    """
    options = job.options
    with TemporaryDirectory(dir=writer.directory, prefix="layers.") as layer_folder:
        weight_bits, quantization = _quantization(job, windows, plan, writer.directory)
        decoder = job.decoder if quantization is None else quantization.decoder
        export = BundleExport(writer, job, decoder, windows, eviction, Path(layer_folder), hooks)

        def add_layer(layer: Layer) -> None:
            export.add_layer(layer if quantization is None else quantization.quantize(layer))

        report = job.convert(windows, plan, add_layer)
        if quantization is not None and quantization.source_weights is not None:
            report = replace(report, source_weights=quantization.source_weights)
            job.progress.note(quantization.source_weights.note)
        export.record_self_test()
    contract = export.write()
    report = replace(
        report,
        kept_float32=export.float32_parts,
        weights=export.weights,
        weight_bytes=(writer.directory / DATA_FILE).stat().st_size,
        quantization=None if quantization is None else quantization.divergence(),
        weight_bits=weight_bits,
        weight_method=None if quantization is None else options.weight_method,
        eviction=eviction,
        capacity=job.capacity,
        kv_bytes_at_capacity=kv_bytes(report.layers, options.dtype, eviction, job.capacity),
        kv_bytes_at_capacity_original=kv_bytes(
            [layer.original for layer in report.layers], options.dtype, None, job.capacity
        ),
    )
    return contract, export.manifest(contract, report), report


@device_computation()
def compress(
    checkpoint: Path, output: Path, options: BuildOptions, progress: Progress, *, force: bool = False
) -> BuildReport:
    """Compress a checkpoint and write it as a Hugging Face checkpoint.

    The checkpoint appears at `output` complete, or not at all.

    Raises:
        UsageError: as for `build`, or a Hugging Face checkpoint cannot represent the result.
        GateFailed: the written checkpoint does not give the logits of the converted model.
        CannotRunHere: this machine lacks memory, disk space or a package.
    """
    require_output(output, marker="config.json", force=force)
    if output.resolve() == checkpoint.resolve():
        raise UsageError(
            "the output must not be the checkpoint itself", got=output, fix="choose another --output"
        )
    job = ConversionJob(checkpoint, output, options, progress)
    plan, form = plan_hf_checkpoint(job)
    dtype = getattr(torch, options.dtype)
    with atomic_directory(output, marker="config.json", force=force) as directory:
        job.plan_progress(("text", "convert", "heal", "read-back"))
        windows = job.calibrate()
        writer = HFCheckpointWriter(directory, form, job.decoder, dtype)
        offset = form.architecture.family.norm_offset
        expected = ExpectedLogits(job.decoder, windows, dtype, offset, job.capacity)

        def add_layer(layer: Layer) -> None:
            writer.add_layer(layer)
            expected.add_layer(layer)

        report = job.convert(windows, plan, add_layer)
        writer.finish()
        job.checkpoint.copy_tokenizer(directory)
        if "auto_map" in form.config:
            job.checkpoint.copy_tokenizer(directory, ("*.py",))
        with job.stages.timed("read-back"), progress.stage("Reading the checkpoint back", 0):
            result, reason = read_back(directory, expected)
        job.saved.files.require_unchanged()
    if reason is not None:
        progress.note(f"the checkpoint was not compared with transformers: {reason}")
    return replace(report, read_back=result)


@device_computation()
def calibrate(
    checkpoint: Path,
    output: Path,
    recipe: Recipe,
    progress: Progress,
    *,
    capacity: int | None = None,
    force: bool = False,
    device: str = AUTO,
    cache: Path | None = None,
) -> int:
    """Save calibration statistics, from which `build`, `compress` and `analyze` can start.

    Args:
        capacity: maximum sequence length of the bundles in tokens; default: the model's, at most 4096.
        force: replace existing statistics.
        device: device on which PyTorch computes, as `BuildOptions` takes it.
        cache: folder of the build cache, where finished stages are kept and found; None: no cache.

    Returns:
        The number of calibration tokens.

    Raises:
        UsageError: the checkpoint, the recipe or the output is not usable.
        CannotRunHere: this machine lacks memory, disk space or a package.
    """
    require_output(output, marker=STATISTICS_FILE, force=force)
    options = BuildOptions(recipe, device=device, cache=cache)
    job = ConversionJob(checkpoint, None, options, progress, capacity)
    with atomic_directory(output, marker=STATISTICS_FILE, force=force) as directory:
        job.plan_progress(("text", "analysis"), analyzes=True)
        windows = job.calibrate()
        writer = StatisticsWriter(directory, job.statistics_source())
        writer.save_tokens(windows)
        job.analysis.analyze(windows, directory, writer)
        job.saved.files.require_unchanged()
        writer.finish()
    return windows.numel()


def _quantization(
    job: ConversionJob, windows: Tensor, plan: CompressionPlan, folder: Path
) -> tuple[WeightBits | None, WeightQuantization | None]:
    """The choice of bits, and the quantisation of a build's weights; None if all are stored in float."""
    if not job.options.quantizes:
        return None, None
    stored, formats = stored_format(job.checkpoint.config), requested_formats(job.options, job.decoder)
    settings, chosen, head_inputs = weight_settings(job.options, formats), None, None
    if job.weight_analysis.is_needed:
        kept = set() if stored is None else kept_weights(job.decoder, plan, formats, job.options)
        formats, chosen, head_inputs = job.weight_analysis.choose(windows, folder, kept)
    return chosen, WeightQuantization(
        job.decoder,
        formats,
        windows,
        settings,
        head_inputs=head_inputs,
        device=job.device,
        stored_as=None if stored is None else stored.name,
        requested_block=job.options.weight_block,
    )


def _note_frequencies(job: ConversionJob) -> None:
    """Note that short texts get the frequencies of long ones, as a graph has one table of them."""
    for switch in sorted(job.rope_switches):
        if switch < job.capacity:
            job.progress.note(
                "the RoPE scaling of config.json has other frequencies for texts of more than "
                f"{switch} tokens: with a capacity of {job.capacity} tokens the bundle uses them for shorter "
                f"texts, too; for short texts as in transformers, build with --capacity {switch}"
            )


def _eviction(request: EvictionRequest, job: ConversionJob) -> Eviction | None:
    """The eviction of a build; None if every layer holds its sliding window instead.

    Raises:
        UsageError: the request does not fit the model.
    """
    requested = request.of(job.capacity, len(job.windows))
    eviction = requested.outside_windows(job.windows)
    if eviction != requested:
        layers = "no layer evicts" if eviction is None else f"{len(eviction.skip_layers)} layers do not evict"
        job.progress.note(
            f"{layers}: a sliding window of at most {requested.budget} tokens is held whole, without loss"
        )
    return eviction


def _require_valid(validation: ValidationReport, dtype: str) -> None:
    """
    Raises:
        GateFailed: an output of the graph differs from the reference by more than the tolerance.
    """
    if validation.failures:
        fix = f"use --dtype float32; if that passes, this model does not tolerate rounding to {dtype}"
        raise GateFailed(
            "the exported graph does not match its PyTorch reference",
            got="\n".join(validation.failures),
            fix=None if dtype == "float32" else fix,
        )
