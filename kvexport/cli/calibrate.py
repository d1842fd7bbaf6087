"""`kvexport calibrate`."""

from __future__ import annotations

from pathlib import Path

import click

from kvexport.cli.conversion import calibration_options, calibration_recipe, output_option


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@output_option("Statistics directory")
@calibration_options
@click.option("--force", is_flag=True, help="Replace existing statistics.")
@click.option("--quiet", is_flag=True, help="Print no progress.")
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
    """Save statistics of CHECKPOINT's keys, queries and values on calibration text, for several builds.

    `kvexport build CHECKPOINT --statistics OUTPUT` then gives the same bundle as a build that calibrates by
    itself.
    """
    from kvexport.build import calibrate
    from kvexport.cli.options import progress_bar

    with progress_bar(quiet) as progress:
        recipe = calibration_recipe(calibration, samples, length, seed)
        tokens = calibrate(checkpoint, output, recipe, progress, force=force)
        progress.note(f"wrote {output}: statistics of {tokens} calibration tokens")
