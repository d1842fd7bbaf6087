"""Validate an exported graph against its PyTorch reference, teacher-forced: a prefill, then single steps.

`validate_graph` needs the memory of one layer and no finished bundle; a build ends with it. `validate_bundle`
runs the bundle as it is deployed. Linear maps with integer weights compute in float32 in both, so that the
gates are as tight as without; what a session loses on a CPU, which rounds activations to int8, is reported
apart. Both first fill the cache with garbage, so that a graph fails if it reads
slots that were never written.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kvexport.bundle import Bundle
from kvexport.bundle.graph_io import GraphContract
from kvexport.eviction.config import Eviction
from kvexport.progress import Progress
from kvexport.runtime.backends.select import choose
from kvexport.validate.deployed import computed_in, run_deployed
from kvexport.validate.layerwise import COMPUTED_IN, run_layerwise
from kvexport.validate.reference_run import FILE, prefill_of, read_reference
from kvexport.validate.reference_slots import reference_slots
from kvexport.validate.rounding import compare_predictions
from kvexport.validate.verdict import ValidationReport, judge


def validate_graph(
    directory: Path,
    contract: GraphContract,
    progress: Progress,
    eviction: Eviction | None = None,
    *,
    quantized: bool = False,
) -> ValidationReport:
    """Compare the graph in `directory` with the reference recorded beside it, one layer in memory at a time.

    Args:
        directory: holds decoder.onnx, its data and reference.npz.
        contract: of decoder.onnx.
        progress: shows the stage.
        eviction: that of the bundle.
        quantized: whether the graph has integer weights.

    Raises:
        BundleError: the recorded reference is unreadable or incomplete.
    """
    reference = read_reference(directory / FILE, contract.num_layers, eviction)
    ids = reference["input_ids"]
    prefill = prefill_of(len(ids), eviction)
    slots = reference_slots(reference, eviction, contract.num_layers)
    measured = run_layerwise(directory, contract, ids, prefill, progress, slots, quantized=quantized)
    return judge(contract.dtype, COMPUTED_IN[contract.dtype], measured, reference, prefill)


def validate_bundle(path: Path, progress: Progress, provider: str = "auto") -> ValidationReport:
    """Compare the bundle in `path`, run as it is deployed, with the reference recorded when it was built.

    Args:
        provider: "cpu", "cuda", "tensorrt" or "auto", as in `kvexport.runtime.Session`. A TensorRT engine
            gives only logits, keys and values, so that only these are compared.

    Raises:
        BundleError: the bundle is damaged (every file is hashed first, and the engine's plan) or incomplete.
        CannotRunHere: this machine lacks the memory, a package, or what the provider needs.
    """
    bundle = Bundle.open(path)
    bundle.verify()
    chosen = choose(bundle, provider)
    if chosen.engine is not None:
        chosen.engine.verify()
    reference = read_reference(path / FILE, len(bundle.layers), bundle.eviction)
    ids = reference["input_ids"]
    prefill = prefill_of(len(ids), bundle.eviction)
    slots = reference_slots(reference, bundle.eviction, len(bundle.layers))
    measured = run_deployed(bundle, ids, prefill, progress, chosen, slots)
    report_of_rounding = None
    if rounds_activations(bundle, chosen.name):
        rounded = run_deployed(bundle, ids, prefill, progress, chosen, slots, exact=False)
        report_of_rounding = compare_predictions(measured["logits"], rounded["logits"])
    compared = {name: array for name, array in reference.items() if name == "input_ids" or name in measured}
    report = judge(
        bundle.dtype, computed_in(bundle.dtype, chosen.name), measured, compared, prefill, chosen.name
    )
    return replace(report, int8_activations=report_of_rounding)


def rounds_activations(bundle: Bundle, provider: str) -> bool:
    """Whether a session rounds activations to int8: with integer weights, on ONNX Runtime's CPU."""
    return (
        bundle.weights.is_quantized
        and provider == "cpu"
        and computed_in(bundle.dtype, provider) == bundle.dtype
    )
