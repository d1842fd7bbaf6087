"""The main job in one go: checkpoint to converted, exported, validated bundle, or to a standard checkpoint.

Knows the order of the stations and what each hands to the next; every station's own knowledge stays there.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from kvexport.build.conversion_job import BuildOptions, BuildReport, Job, capacity_of
from kvexport.build.float16_overflow import float32_exceptions
from kvexport.build.text_files import write_text_files
from kvexport.bundle.bundle import DATA_FILE, REPORT_FILE, new_bundle
from kvexport.bundle.manifest import kv_bytes
from kvexport.calibrate import PeakMeter, Recipe, save_header, save_moments
from kvexport.convert import (
    CompressionPlan,
    LayerPlan,
    measure_moments,
    require_ratio,
    trained_shape,
    uniform_shape,
)
from kvexport.errors import GateFailed
from kvexport.eviction.config import Eviction
from kvexport.files.atomic_directory import atomic_directory, require_output
from kvexport.graph import GRAPH_FILE, DecoderWriter, Float32Exceptions, write_lowered
from kvexport.model.decoder import Layer
from kvexport.model.hf_writer import HFCheckpointWriter, require_hf_checkpoint
from kvexport.progress import Progress
from kvexport.validate import ReferenceRecorder, prove
from kvexport.validate.self_test_recorder import SelfTestRecorder
from kvexport.version import __version__

if TYPE_CHECKING:
    from kvexport.graph import GraphContract

__all__ = ["BuildOptions", "BuildReport", "build", "calibrate", "compress"]


def build(
    checkpoint: Path,
    output: Path,
    plan: BuildOptions,
    progress: Progress,
    *,
    capacity: int | None = None,
    force: bool = False,
) -> BuildReport:
    """Calibrate, convert, export, prove: the bundle at `output` appears whole, or not at all.

    Raises:
        UsageError: the checkpoint, the plan or the output cannot be used.
        GateFailed: the exported graph is not its PyTorch twin; no bundle is left.
        CannotRunHere: this machine lacks memory, disk or a package.
    """
    with new_bundle(output, force=force) as writer:
        job = Job(checkpoint, plan, progress)
        require_ratio(plan.request, job.methods, job.decoder.layers[0].attention)
        job.check_tokenizer()
        decoder, limit = job.decoder, capacity_of(job.decoder, capacity)
        eviction = None if plan.eviction is None else plan.eviction.of(limit, len(decoder.layers))
        windows = job.windows()
        choice = job.plan_compression(windows, limit)
        twin = ReferenceRecorder(decoder, windows, limit, eviction)
        graph = DecoderWriter(
            writer.directory,
            dtype=plan.dtype,
            capacity=limit,
            dims=decoder.dims,
            embedding=decoder.embedding,
            rope=decoder.rope,
            eviction=eviction,
        )

        peaks = PeakMeter(decoder, windows) if plan.dtype == "float16" else None

        with TemporaryDirectory(dir=writer.directory, prefix="layers.") as laid_aside:
            greedy = SelfTestRecorder(decoder, windows, limit, eviction, plan.dtype, Path(laid_aside))

            def take(layer: Layer) -> None:
                twin.add_layer(layer)
                graph.add_layer(layer)
                greedy.add_layer(layer)
                if peaks is not None:
                    peaks.add_layer(layer)

            report = job.convert(windows, choice, take, limit, output)
            with job.timed("self-test"):
                greedy.record(progress)
        report.eviction, report.capacity = eviction, limit
        report.kv_bytes_at_capacity = kv_bytes(report.layers, plan.dtype, eviction, limit)
        twin.save(writer.directory)
        kept = Float32Exceptions() if peaks is None else float32_exceptions(peaks)
        if kept.names:
            report.kept_float32 = kept.names
            progress.note(
                f"float16 cannot hold all numbers of this model: kept in float32: {', '.join(kept.names)}"
            )
        contract = graph.finish(decoder.final_norm, decoder.head, kept)
        greedy.save(writer.directory, writer.sha256(DATA_FILE))
        write_lowered(writer.directory / GRAPH_FILE, plan.dtype)
        job.checkpoint.copy_tokenizer(writer.directory)
        write_text_files(
            checkpoint,
            writer.directory,
            capacity=limit,
            vocab_size=decoder.dims.vocab_size,
            bos=decoder.bos_token_id,
            eos=decoder.eos_token_ids,
            progress=progress,
        )
        with job.timed("prove"):
            report.validation = prove(writer.directory, contract, progress, eviction)
        if report.validation.failures:
            rounding = (
                f"try --dtype float32: if that passes, rounding to {plan.dtype} is more than this model takes"
            )
            raise GateFailed(
                "the exported graph is not its PyTorch twin:\n" + "\n".join(report.validation.failures),
                fix=None if plan.dtype == "float32" else rounding,
            )
        (writer.directory / REPORT_FILE).write_text(
            json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8"
        )
        writer.seal(_manifest(job, limit, eviction, contract, report))
    return report


def compress(
    checkpoint: Path, output: Path, plan: BuildOptions, progress: Progress, *, force: bool = False
) -> BuildReport:
    """Convert, and write a standard Hugging Face checkpoint.

    Raises:
        UsageError: as `build`, and where the result would not be a standard checkpoint.
    """
    require_output(output, marker="config.json", force=force)
    job = Job(checkpoint, plan, progress)
    shape = uniform_shape(plan.request, job.methods, job.decoder.layers[0].attention)
    require_hf_checkpoint(job.decoder, plan.method, shape != trained_shape(job.decoder.layers[0].attention))
    with atomic_directory(output, marker="config.json", force=force) as directory:
        writer = HFCheckpointWriter(directory, job.decoder, job.checkpoint.config, getattr(torch, plan.dtype))
        method = job.methods[0]
        if job.decoder.layers[0].attention.position == "alibi":
            if job.compresses:
                progress.note(
                    "transformers knows no shared KV heads for BLOOM: the checkpoint has each of them once for every head that "
                    "it serves, so that other programs cache as much as before; a bundle of `kvexport build` caches less"
                )
            method = replace(method, matched=False)  # heads stay where their slopes are
        choice = CompressionPlan([LayerPlan(method, shape)] * len(job.decoder.layers))
        report = job.convert(job.windows(), choice, writer.add_layer, capacity_of(job.decoder), output)
        writer.finish()
        job.checkpoint.copy_tokenizer(directory)
    return report


def calibrate(
    checkpoint: Path, output: Path, recipe: Recipe, progress: Progress, *, force: bool = False
) -> int:
    """Write statistics that `build` and `compress` can start from; returns how many tokens were measured."""
    require_output(output, marker="statistics.json", force=force)
    job = Job(checkpoint, BuildOptions(recipe), progress)
    with atomic_directory(output, marker="statistics.json", force=force) as directory:
        windows = job.windows()
        save_header(directory, job.digest, recipe, windows)
        with progress.stage("Measuring layers", len(job.decoder.layers)):
            for index, moments in enumerate(measure_moments(job.decoder, windows)):
                save_moments(directory, index, moments)
                progress.advance()
    return windows.numel()


def _manifest(
    job: Job, capacity: int, eviction: Eviction | None, contract: GraphContract, report: BuildReport
) -> dict[str, Any]:
    dims = job.decoder.dims
    return {
        "kvexport": __version__,
        "source": {
            "name": report.source,
            "model_type": job.checkpoint.config["model_type"],
            "sha256": job.digest,
        },
        "calibration": job.calibration() if job.compresses else None,
        "model": {
            "vocab_size": dims.vocab_size,
            "hidden_size": dims.hidden_size,
            "num_hidden_layers": len(report.layers),
            "max_position_embeddings": dims.max_positions,
            "bos_token_id": job.decoder.bos_token_id,
            "eos_token_ids": list(job.decoder.eos_token_ids),
        },
        "dtype": job.plan.dtype,
        "capacity": capacity,
        "eviction": None if eviction is None else eviction.to_json(),
        "layers": [asdict(layer) for layer in report.layers],
        "graph": contract.to_json(),
    }
