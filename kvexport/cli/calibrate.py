"""`kvexport calibrate`."""

from __future__ import annotations

from pathlib import Path

import click

from kvexport.cli.conversion import (
    build_cache_folder,
    calibration_options,
    calibration_recipe,
    capacity_option,
    no_cache_option,
    output_option,
)


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@output_option("Statistics directory")
@calibration_options
@capacity_option
@no_cache_option
@click.option("--force", is_flag=True, help="Replace existing statistics.")
@click.option("--quiet", is_flag=True, help="Print no progress.")
def command(
    checkpoint: Path,
    output: Path,
    calibration: str | None,
    samples: int | None,
    length: int | None,
    seed: int | None,
    device: str,
    capacity: int | None,
    no_cache: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Save calibration text and the sensitivity of each layer of CHECKPOINT, for several builds.

    `kvexport build CHECKPOINT --statistics OUTPUT` then gives the same bundle as a build that calibrates by
    itself, at any --kv-ratio, and only converts and writes. They are for the config.json and weights of
    CHECKPOINT; another tokenizer.json does not make them invalid, as their tokens have been made.
    """
    from kvexport.build import calibrate
    from kvexport.cli.options import progress_bar

    with progress_bar(quiet) as progress:
        recipe = calibration_recipe(calibration, samples, length, seed)
        tokens = calibrate(
            checkpoint,
            output,
            recipe,
            progress,
            capacity=capacity,
            force=force,
            device=device,
            cache=build_cache_folder(no_cache),
        )
        progress.note(f"wrote {output}: statistics of {tokens} calibration tokens")
