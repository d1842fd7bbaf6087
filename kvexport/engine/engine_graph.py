"""Prepare the graph of an engine in memory: choose a lowering that the parser imports, and fix the sizes.

Needs no TensorRT, so that `kvexport lint` needs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from kvexport.bundle.graph_io import BATCH, BUDGET, CAPACITY, CHUNK, ring_sizes, sized
from kvexport.devices.capabilities import TENSORRT_LOWERINGS
from kvexport.graph.lint import Finding, Parser, lint, refusals
from kvexport.graph.lowering import lower
from kvexport.graph.nodes import sizes as shape_of


@dataclass(frozen=True)
class EngineGraph:
    """A graph for one parser.

    Attributes:
        lowering: name of the lowering.
        model: the graph in memory; its weights stay external and are not read.
        findings: what lint finds; includes refusals only if every lowering has some, or the lowering was
            requested.
        rejected: refusals of the lowerings that were tried before, by name.
    """

    lowering: str
    model: ir.Model
    findings: list[Finding]
    rejected: Mapping[str, list[Finding]]


def prepare_graph(
    graph: Path,
    parser: Parser,
    *,
    batch: int,
    capacity: int,
    chunk: int = CHUNK,
    budget: int | None = None,
    lowering: str | None = None,
) -> EngineGraph:
    """Lower a bundle's graph to the best form that a parser takes completely, or to the requested form.

    Args:
        graph: path of the bundle's decoder.onnx.
        parser: parser of the engine.
        batch: sequences of a call.
        capacity: largest number of tokens of a sequence.
        chunk: tokens of the longest call.
        budget: slots of a sequence in layers with eviction; None: no such layers.
        lowering: name of the requested lowering; None: the best.

    Raises:
        UsageError: there is no such lowering.
        BundleError: the graph does not have the form that `DecoderWriter` writes.
    """
    sizes = {BATCH: batch, CAPACITY: capacity} | ({} if budget is None else {BUDGET: budget})
    rejected: dict[str, list[Finding]] = {}
    for name in TENSORRT_LOWERINGS if lowering is None else (lowering,):
        model = lower(graph, name)
        axes = [axis for value in model.graph.inputs for axis in shape_of(value)]
        fix_sizes(model, sizes | ring_sizes(axes, capacity, chunk))
        findings = lint(model, parser)
        if not refusals(findings):
            break
        rejected[name] = refusals(findings)
    rejected.pop(name, None)
    return EngineGraph(name, model, findings, rejected)


def fix_sizes(model: ir.Model, sizes: Mapping[str, int]) -> None:
    """Replace symbolic sizes of the graph's inputs by numbers, in place; TensorRT infers all other shapes.

    Args:
        sizes: number of each symbol; also "batch*8" is replaced if `sizes` has "batch".
    """
    for value in model.graph.inputs:
        value.shape = ir.Shape([sized(size, sizes) for size in shape_of(value)])
