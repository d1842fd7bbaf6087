"""The graph as an engine will get it: the lowering that its parser imports, with the engine's sizes fixed, in memory.

Knows lowerings and lint; imports no TensorRT, so that `kvexport lint` needs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from kvexport.bundle.graph_io import BATCH, BUDGET, CAPACITY, sized
from kvexport.devices.capabilities import TENSORRT_LOWERINGS
from kvexport.graph.lint import Finding, Parser, lint, refusals
from kvexport.graph.lowering import lower
from kvexport.graph.nodes import sizes as shape_of


@dataclass(frozen=True)
class EngineGraph:
    """A graph for one parser.

    Attributes:
        lowering: its name.
        model: in memory, its weights external and not read.
        findings: lint's; none is a refusal, unless no lowering is free of them or one was asked for by name.
        passed_over: what the parser refuses of the lowerings before this one, by name.
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
    budget: int | None = None,
    lowering: str | None = None,
) -> EngineGraph:
    """The best lowering of which `parser` refuses nothing, or the one named.

    Args:
        budget: slots of a sequence in layers that evict; None: there are none.
        lowering: its name; None: the best.

    Raises:
        UsageError: there is no such lowering.
        BundleError: the graph is not of the form that `DecoderWriter` writes.
    """
    sizes = {BATCH: batch, CAPACITY: capacity} | ({} if budget is None else {BUDGET: budget})
    rejected: dict[str, list[Finding]] = {}
    for name in TENSORRT_LOWERINGS if lowering is None else (lowering,):
        model = lower(graph, name)
        fix_sizes(model, sizes)
        findings = lint(model, parser)
        if not refusals(findings):
            break
        rejected[name] = refusals(findings)
    rejected.pop(name, None)
    return EngineGraph(name, model, findings, rejected)


def fix_sizes(model: ir.Model, sizes: Mapping[str, int]) -> None:
    """Give the named dimensions of the graph's inputs, and products of one with a number, their sizes, in place.

    TensorRT infers the rest.
    """

    for value in model.graph.inputs:
        value.shape = ir.Shape([sized(size, sizes) for size in shape_of(value)])
