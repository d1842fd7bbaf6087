"""`kvexport build`: options in, report out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kvexport.cli.conversion import conversion_options, eviction_options, plan_from, shape_options
from kvexport.convert.method_names import BEST, METHOD_NAMES, method_help
from kvexport.errors import UsageError


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.option(
    "--demo", is_flag=True, help="Build the small model that comes with kvexport, instead of CHECKPOINT."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="The bundle's directory; it must not exist.",
)
@click.option(
    "--method", type=click.Choice(METHOD_NAMES), default=BEST, show_default=True, help=method_help()
)
@conversion_options
@shape_options
@eviction_options
@click.option(
    "--capacity", type=int, help="Tokens that a sequence may hold [default: the model's, at most 4096]."
)
@click.option("--force", is_flag=True, help="Replace the bundle that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@click.option("--quiet", is_flag=True, help="No progress and no report.")
def command(
    checkpoint: Path | None,
    demo: bool,
    output: Path,
    capacity: int | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Turn a Hugging Face CHECKPOINT into a bundle with fewer KV heads, proved against PyTorch.

    Calibrates, converts, writes the ONNX decoder, validates it, and prints what it cost. Nothing is left behind
    if any step fails.
    """
    if (checkpoint is None) != demo:
        raise UsageError("give a CHECKPOINT, or --demo", got="both" if demo else "neither")
    from kvexport.build.pipeline import build
    from kvexport.cli.options import progress_bar
    from kvexport.cli.report import print_build
    from kvexport.files.resources import resource

    source = resource("models", "demo") if checkpoint is None else checkpoint
    with progress_bar(quiet) as progress:
        report = build(source, output, plan_from(options), progress, capacity=capacity, force=force)
    print_build(report, output, as_json=as_json, quiet=quiet)
