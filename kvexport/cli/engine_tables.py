"""Tables of `kvexport engine` and `kvexport lint`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvexport.cli.report import PlainConsole, facts_table, plain_table, size

if TYPE_CHECKING:
    from kvexport.engine import BuildRecord
    from kvexport.engine.engine_graph import EngineGraph

_NATIVE_LAYERS = {
    "KV_CACHE_UPDATE": "in-place cache updates",
    "ATTENTION_INPUT": "attentions",
    "ROTARY_EMBEDDING": "rotary embeddings",
}


def print_engine(record: BuildRecord, bundle: Path) -> None:
    """Print the properties of a built engine and the cost of building it."""
    from kvexport.engine import engine_directory

    table = facts_table()
    engine = "TensorRT-RTX" if record.engine == "tensorrt-rtx" else "TensorRT"
    table.add_row(
        "engine", f"{engine} {record.version}, compute capability {', '.join(record.compute_capability)}"
    )
    table.add_row("graph", f"{record.lowering}, {record.dtype}")
    native = [
        f"{record.layers[kind]} {name}" for kind, name in _NATIVE_LAYERS.items() if kind in record.layers
    ]
    table.add_row("fused layers", ", ".join(native) or "none: all are built from elementary operations")
    for profile in record.profiles:
        least, _, most = profile.sequence
        tokens = str(most) if least == most else f"{least} to {most}"
        table.add_row(
            f"profile {profile.name}",
            f"{tokens} tokens per call, sequences of up to {record.capacity} tokens",
        )
    table.add_row("plan", f"{size(record.plan.bytes)} (weights {size(record.weights_bytes)})")
    if record.activation_bytes is not None:
        table.add_row("device memory for activations", size(record.activation_bytes))
    table.add_row("peak host memory of the build", size(record.peak_host_bytes))
    out = PlainConsole()
    out.print(table)
    out.print_line(f"took {record.seconds:.1f} s")
    out.print_line(f"wrote {engine_directory(bundle, record.target)}")


def print_findings(graph: EngineGraph, parser: str, *, supported: bool) -> None:
    """Print one row for each finding, unsupported nodes first, and what they mean for the lowerings."""
    out = PlainConsole()
    if graph.findings:
        table = plain_table("node", "operator", "problem", "fix")
        for column in table.columns:
            column.justify = "left"
        for finding in sorted(graph.findings, key=lambda finding: finding.note):
            problem = f"note: {finding.problem}" if finding.note else finding.problem
            table.add_row(finding.node, finding.operator, problem, finding.remedy)
        out.print(table)
    for name, findings in graph.rejected.items():
        nodes = "1 node is" if len(findings) == 1 else f"{len(findings)} nodes are"
        out.print_line(f"{name} is not used: {nodes} not supported (--lowering {name} lists them)")
    if supported:
        out.print_line(f"{parser} supports the bundle in the lowering {graph.lowering}")
