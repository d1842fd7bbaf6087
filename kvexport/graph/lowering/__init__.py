"""Lowerings: the one graph of a bundle, spelled for an engine that does not import or not profit from the standard form.

Each is a sequence of passes over an in-memory copy, with pre- and post-conditions; the weights stay where they are. All
give the same logits and keys and values within rounding, on ONNX Runtime's CPU, by test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from kvexport.bundle.graph_io import (
    EVICTING,
    LOWERED_FILES,
    SEQUENCE,
    STATE,
    VARIANT,
    GraphContract,
    TensorSpec,
    slots_output,
    update,
)
from kvexport.bundle.manifest import REBUILD
from kvexport.errors import BundleError, UsageError
from kvexport.graph.lowering.gqa import GroupQueryAttention
from kvexport.graph.lowering.grouped import GroupedAttention
from kvexport.graph.lowering.primitives import OPSET, Primitives
from kvexport.graph.lowering.split import SplitCache

__all__ = ["LOWERINGS", "lower", "lowered_contract", "write_lowered"]

# std24         TensorRT 10.15 and later, TensorRT-RTX: as it is.
# decomposed17  TensorRT 10.3 (JetPack 6) and 10.13 (JetPack 7.0, 7.1).
# ort-cpu       grouped products where KV heads are shared, GroupQueryAttention where they are not (benchmarks/decode_cpu.py).
# ort-cuda      GroupQueryAttention: an explicit mask would keep ONNX Runtime from its flash kernels. Layers that evict need
#               one, and with it, where heads are shared, ONNX Runtime copies the cache once for each query head (its pull
#               request 28358, LaunchUngroup): grouped products there.
LOWERINGS: dict[str, Callable[[], Sequence[ir.passes.PassBase]]] = {
    "std24": list,
    "decomposed17": lambda: [SplitCache(), Primitives()],
    "ort-cpu": lambda: [GroupQueryAttention(only_unshared=True), GroupedAttention()],
    "ort-cuda": lambda: [GroupQueryAttention(), GroupedAttention(only_evicting=True)],
}


def lower(path: Path, name: str) -> ir.Model:
    """The graph at `path`, lowered, in memory; its weights are external in the same folder and not read.

    Raises:
        UsageError: there is no such lowering.
        BundleError: the graph is not of the form that `DecoderWriter` writes.
    """
    _require_known(name)
    model = ir.load(path)
    passes = LOWERINGS[name]()
    try:
        for each in (*passes, RemoveUnusedNodesPass()) if passes else ():
            model = each(model).model
    except (ir.passes.PreconditionError, ir.passes.PostconditionError) as error:
        raise BundleError(f"{path} cannot be lowered to {name}: {error}", fix=REBUILD) from error
    return model


def lowered_contract(contract: GraphContract, name: str) -> GraphContract:
    """What the lowered graph takes and gives.

    Raises:
        UsageError: there is no such lowering.
    """
    _require_known(name)
    variant = name if contract.variant == VARIANT else f"{name}{EVICTING.removeprefix(VARIANT)}"
    if name != "decomposed17":
        return dataclasses.replace(contract, variant=variant)
    caches = [spec for spec in contract.inputs if spec.name.startswith("past_key_values.")]
    given = []
    for spec in caches:
        _, layer, which = spec.name.split(".")
        rows, heads, _, width = spec.shape
        given.append(TensorSpec(update(int(layer), which), spec.dtype, (rows, heads, SEQUENCE, width)))
        if which == STATE:
            given.append(TensorSpec(slots_output(int(layer)), "int64", (rows,)))
    return dataclasses.replace(contract, variant=variant, opset=OPSET, outputs=(contract.outputs[0], *given))


def write_lowered(graph: Path, dtype: str) -> None:
    """Write what ONNX Runtime runs faster than the standard form beside `graph`, where there is such a thing.

    On its CPU, graphs of float32; on CUDA, those of float16 and bfloat16.
    """
    for device in {"float32": ("cpu",), "float16": ("cuda",), "bfloat16": ("cuda",)}[dtype]:
        ir.save(lower(graph, f"ort-{device}"), graph.parent / LOWERED_FILES[device])


def _require_known(name: str) -> None:
    if name not in LOWERINGS:
        raise UsageError("no such lowering", got=name, expected=", ".join(LOWERINGS))
