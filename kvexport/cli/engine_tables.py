"""What `engine` and `lint` show to people; knows how figures are shown, and nothing of how they are made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvexport.cli.report import PlainConsole, facts_table, plain_table, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvexport.engine import BuildRecord
    from kvexport.graph.lint import Finding

_NATIVE = {
    "KV_CACHE_UPDATE": "cache updates in place",
    "ATTENTION_INPUT": "attentions",
    "ROTARY_EMBEDDING": "rotations",
}


def print_engine(record: BuildRecord, bundle: Path) -> None:
    """What was built, and what it took."""
    from kvexport.engine import engine_directory

    table = facts_table()
    engine = "TensorRT-RTX" if record.engine == "tensorrt-rtx" else "TensorRT"
    table.add_row(
        "engine", f"{engine} {record.version}, compute capability {', '.join(record.compute_capability)}"
    )
    table.add_row("graph", f"{record.lowering}, {record.dtype}")
    native = [f"{record.layers[kind]} {words}" for kind, words in _NATIVE.items() if kind in record.layers]
    table.add_row("native layers", ", ".join(native) or "none: built of primitives")
    for profile in record.profiles:
        least, _, most = profile.sequence
        tokens = str(most) if least == most else f"{least} to {most}"
        table.add_row(
            f"profile {profile.name}", f"{tokens} tokens a call, sequences of up to {record.capacity}"
        )
    table.add_row("plan", f"{size(record.plan.bytes)} (weights {size(record.weights_bytes)})")
    if record.activation_bytes is not None:
        table.add_row("device memory to run", size(record.activation_bytes))
    table.add_row("peak host memory", size(record.peak_host_bytes))
    out = PlainConsole()
    out.print(table)
    out.say(f"took {record.seconds:.1f} s")
    out.say(f"wrote {engine_directory(bundle, record.target)}")


def print_findings(findings: Sequence[Finding]) -> None:
    """One row for each finding; refusals first."""
    table = plain_table("node", "operator", "problem", "remedy")
    for column in table.columns:
        column.justify = "left"
    for finding in sorted(findings, key=lambda finding: finding.note):
        table.add_row(
            finding.node,
            finding.operator,
            ("note: " if finding.note else "") + finding.problem,
            finding.remedy,
        )
    PlainConsole().print(table)
