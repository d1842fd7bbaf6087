"""The two ways to prove an exported graph against its PyTorch twin, teacher-forced: a prefill, then single steps.

`prove` needs the memory of one layer and no finished bundle: it is how a build ends. `validate` runs the bundle as
it is deployed. Both fill the cache with garbage first, so that a graph which looks beyond what was written fails.
"""

from __future__ import annotations

from pathlib import Path

from kvexport.bundle.bundle import Bundle
from kvexport.bundle.graph_io import GraphContract
from kvexport.eviction.config import Eviction
from kvexport.progress import Progress
from kvexport.runtime.backends.select import choose
from kvexport.validate.deployed import computed_in, run_deployed
from kvexport.validate.layerwise import COMPUTED_IN, run_layerwise
from kvexport.validate.reference_run import FILE, prefill_of, read_reference
from kvexport.validate.slots import reference_slots
from kvexport.validate.verdict import ValidationReport, judge


def prove(
    directory: Path, contract: GraphContract, progress: Progress, eviction: Eviction | None = None
) -> ValidationReport:
    """Compare the graph in `directory` with the twin recorded beside it, one layer in memory at a time.

    Raises:
        BundleError: what the twin recorded is unreadable or incomplete.
    """
    twin = read_reference(directory / FILE, contract.num_layers, eviction)
    ids = twin["input_ids"]
    prefill = prefill_of(len(ids), eviction)
    measured = run_layerwise(
        directory, contract, ids, prefill, progress, reference_slots(twin, eviction, contract.num_layers)
    )
    return judge(contract.dtype, COMPUTED_IN[contract.dtype], measured, twin, prefill)


def validate(path: Path, progress: Progress, provider: str = "auto") -> ValidationReport:
    """Compare the bundle in `path`, run as it is deployed, with what its twin computed when it was built.

    Args:
        provider: what it is deployed on: "cpu", "cuda", "tensorrt" or "auto", as in `kvexport.runtime.Session`. Of a
            TensorRT engine logits, keys and values are compared: it shows no others.

    Raises:
        BundleError: the bundle is damaged (every file is hashed first, and the engine's plan) or incomplete.
        CannotRunHere: this machine lacks the memory, a package, or what the provider needs.
    """
    bundle = Bundle.open(path)
    bundle.verify()
    chosen = choose(bundle, provider)
    if chosen.engine is not None:
        chosen.engine.verify()
    twin = read_reference(path / FILE, len(bundle.layers), bundle.eviction)
    ids = twin["input_ids"]
    prefill, slots = (
        prefill_of(len(ids), bundle.eviction),
        reference_slots(twin, bundle.eviction, len(bundle.layers)),
    )
    measured = run_deployed(bundle, ids, prefill, progress, chosen, slots)
    shown = {name: array for name, array in twin.items() if name == "input_ids" or name in measured}
    return judge(bundle.dtype, computed_in(bundle.dtype, chosen.name), measured, shown, prefill, chosen.name)
