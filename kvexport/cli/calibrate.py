"""`kvexport calibrate`: options in, saved statistics out."""

from __future__ import annotations

from pathlib import Path

import click

from kvexport.cli.conversion import calibration_options, recipe_from


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="The statistics' directory; it must not exist.",
)
@calibration_options
@click.option("--force", is_flag=True, help="Replace the statistics that are there.")
@click.option("--quiet", is_flag=True, help="No progress.")
def command(
    checkpoint: Path,
    output: Path,
    calibration: str | None,
    samples: int | None,
    length: int | None,
    seed: int | None,
    force: bool,
    quiet: bool,
) -> None:
    """Measure CHECKPOINT's keys, queries and values on calibration text once, for several builds.

    `kvexport build CHECKPOINT --statistics OUTPUT` then gives the same bundle as calibrating anew.
    """
    from kvexport.build.pipeline import calibrate
    from kvexport.cli.options import progress_bar

    with progress_bar(quiet) as progress:
        tokens = calibrate(
            checkpoint, output, recipe_from(calibration, samples, length, seed), progress, force=force
        )
        progress.note(f"{output}: statistics of {tokens} tokens")
