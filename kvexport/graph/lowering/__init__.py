"""Lowerings: rewrites of a bundle's graph for engines that need another form, or run it faster.

Each lowering is a sequence of onnx-ir passes, with pre- and post-conditions, over a copy in memory; the
weights stay in their file. The tests prove on ONNX Runtime's CPU that every lowering gives the same logits,
keys and values within rounding.
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
from kvexport.graph.lowering.gqa import GroupQueryAttention, is_fast_on_cpu
from kvexport.graph.lowering.grouped import GroupedAttention, has_softcap, is_bounded_and_shared
from kvexport.graph.lowering.norms import ResidualNorms
from kvexport.graph.lowering.primitives import Primitives, opset_of
from kvexport.graph.lowering.quantized import QuantizedTables
from kvexport.graph.lowering.split import SplitCache

__all__ = ["LOWERINGS", "lower", "lowered_contract", "write_lowered"]

# std24         TensorRT 10.15 and later, TensorRT-RTX: the graph unchanged, but for softcaps, which the
#               parser refuses: grouped products.
# decomposed17  TensorRT 10.3 (JetPack 6) and 10.13 (JetPack 7.0, 7.1).
# ort-cpu       GroupQueryAttention, or grouped products where KV heads are shared and long
#               (benchmarks/decode_cpu.py, decode_int4.py).
# ort-cuda      GroupQueryAttention: with an explicit mask, ONNX Runtime does not use its flash kernels.
#               Layers with eviction or a ring need a mask, and with a mask and shared heads ONNX Runtime
#               copies the cache for each query head (its pull request 28358, LaunchUngroup): products.
LOWERINGS: dict[str, Callable[[], Sequence[ir.passes.PassBase]]] = {
    "std24": lambda: [GroupedAttention(has_softcap)],
    "decomposed17": lambda: [SplitCache(), Primitives()],
    "ort-cpu": lambda: [
        QuantizedTables(),
        GroupQueryAttention(is_fast_on_cpu),
        GroupedAttention(),
        ResidualNorms(),
    ],
    "ort-cuda": lambda: [QuantizedTables(), GroupQueryAttention(), GroupedAttention(is_bounded_and_shared)],
}


def lower(path: Path, name: str) -> ir.Model:
    """Lower the graph at `path`, in memory; its weights stay external in the same folder and are not read.

    Args:
        name: a key of LOWERINGS.

    Raises:
        UsageError: there is no such lowering.
        BundleError: the graph does not have the form that `DecoderWriter` writes.
    """
    _require_known(name)
    model = ir.load(path)
    passes = LOWERINGS[name]()
    try:
        for graph_pass in (*passes, RemoveUnusedNodesPass()) if passes else ():
            model = graph_pass(model).model
    except (ir.passes.PreconditionError, ir.passes.PostconditionError) as error:
        raise BundleError(f"{path} must be lowered to {name}", got=error, fix=REBUILD) from error
    return model


def lowered_contract(contract: GraphContract, name: str, *, quantized: bool = False) -> GraphContract:
    """Inputs and outputs of the lowered graph.

    Args:
        contract: of the standard graph.
        name: a key of LOWERINGS.
        quantized: whether the graph has integer weights.

    Raises:
        UsageError: there is no such lowering.
    """
    _require_known(name)
    variant = name if contract.variant == VARIANT else f"{name}{EVICTING.removeprefix(VARIANT)}"
    if name != "decomposed17":
        return dataclasses.replace(contract, variant=variant)
    caches = [spec for spec in contract.inputs if spec.name.startswith("past_key_values.")]
    outputs = []
    for spec in caches:
        _, layer, which = spec.name.split(".")
        rows, heads, _, width = spec.shape
        outputs.append(TensorSpec(update(int(layer), which), spec.dtype, (rows, heads, SEQUENCE, width)))
        if which == STATE:
            outputs.append(TensorSpec(slots_output(int(layer)), "int64", (rows,)))
    return dataclasses.replace(
        contract, variant=variant, opset=opset_of(quantized), outputs=(contract.outputs[0], *outputs)
    )


def write_lowered(graph: Path, dtype: str) -> None:
    """Write ONNX Runtime's fastest form beside `graph`: for its CPU in float32, for CUDA otherwise."""
    for device in {"float32": ("cpu",), "float16": ("cuda",), "bfloat16": ("cuda",)}[dtype]:
        ir.save(lower(graph, f"ort-{device}"), graph.parent / LOWERED_FILES[device])


def _require_known(name: str) -> None:
    if name not in LOWERINGS:
        raise UsageError(
            "the lowering must be one that kvexport has", got=name, expected=", ".join(LOWERINGS)
        )
