"""`kvexport compress`: options in, a standard checkpoint and a report out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kvexport.cli.conversion import conversion_options, plan_from
from kvexport.convert.method_names import METHOD_NAMES, method_help


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="The new checkpoint's directory; it must not exist.",
)
@click.option(
    "--method",
    type=click.Choice(METHOD_NAMES),
    default="fold",
    show_default=True,
    help=f"{method_help()} Keys with RoPE need a method that folds into the weights: fold or mean-pool.",
)
@conversion_options
@click.option("--force", is_flag=True, help="Replace the checkpoint that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@click.option("--quiet", is_flag=True, help="No progress and no report.")
def command(checkpoint: Path, output: Path, force: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Turn a Hugging Face CHECKPOINT into another, standard one with fewer KV heads.

    Any tool that reads Hugging Face checkpoints can use it. Rotary keys lose more this way than in a bundle, where
    they may be projected after rotation: compare the reports.
    """
    from kvexport.build.pipeline import compress
    from kvexport.cli.options import progress_bar
    from kvexport.cli.report import print_build

    with progress_bar(quiet) as progress:
        report = compress(checkpoint, output, plan_from(options), progress, force=force)
    print_build(report, output, as_json=as_json, quiet=quiet)
