"""`kvexport build`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kvexport.cli.conversion import (
    build_options,
    capacity_option,
    conversion_options,
    eviction_options,
    method_option,
    output_option,
    shape_options,
    weight_options,
)
from kvexport.convert.method_names import BEST
from kvexport.errors import UsageError


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.option("--demo", is_flag=True, help="Build the demo model that comes with kvexport, not a CHECKPOINT.")
@output_option("Bundle directory")
@method_option(BEST)
@conversion_options
@weight_options
@shape_options
@eviction_options
@capacity_option
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@click.option("--quiet", is_flag=True, help="Print no progress and no report.")
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
    """Compress a Hugging Face CHECKPOINT and export it to a bundle that is validated against PyTorch.

    Calibrates, analyzes the sensitivity of each layer, converts, writes the ONNX decoder, validates it, and
    prints the loss and the sizes. If a step fails, no output is left.
    """
    if (checkpoint is None) != demo:
        raise UsageError(
            "build needs either CHECKPOINT or --demo",
            got="both" if demo else "neither",
            fix="kvexport build CHECKPOINT -o BUNDLE, or kvexport build --demo -o BUNDLE",
        )
    from kvexport.build import build
    from kvexport.cli.options import progress_bar
    from kvexport.cli.report import print_build
    from kvexport.files.resources import resource

    source = resource("models", "demo") if checkpoint is None else checkpoint
    with progress_bar(quiet) as progress:
        report = build(source, output, build_options(options), progress, capacity=capacity, force=force)
    print_build(report, output, as_json=as_json, quiet=quiet)
