"""`kvexport engine`: a bundle in, a TensorRT engine beside it out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from kvexport.errors import CannotRunHere


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--target", help="A device that `kvexport targets` lists, or a TOML file.  [default: this machine]"
)
@click.option(
    "--compute-capability",
    "compute_capabilities",
    multiple=True,
    metavar="X.Y",
    help="Build ahead of time for GPUs of this capability, with TensorRT-RTX; may be given several times.",
)
@click.option("--capacity", type=int, help="Tokens that a sequence may hold.  [default: the bundle's]")
@click.option("--chunk", type=int, help="Tokens of a prompt that are read at once, at most.  [default: 128]")
@click.option("--batch", type=int, default=1, show_default=True, help="Sequences that are decoded at once.")
@click.option(
    "--workspace", type=int, metavar="MIB", help="Scratch memory of a kernel, at most.  [default: TensorRT's]"
)
@click.option(
    "--refit", is_flag=True, help="Leave the weights out of the plan; they are read from the bundle."
)
@click.option("--version-compatible", is_flag=True, help="A plan that later TensorRT versions load too.")
@click.option("--hardware-compatible", is_flag=True, help="A plan for all desktop GPUs from Ampere on.")
@click.option(
    "--optimization-level", type=int, metavar="0-5", help="How long TensorRT searches.  [default: TensorRT's]"
)
@click.option(
    "--lowering",
    help="The form of the graph: std24 or decomposed17.  [default: the best that the parser takes]",
)
@click.option("--force", is_flag=True, help="Replace the engine that is there.")
@click.option("--quiet", is_flag=True, help="No progress and no table.")
@click.option("--json", "as_json", is_flag=True, help="Print the build's record as one JSON object.")
def command(
    bundle: Path,
    target: str | None,
    compute_capabilities: tuple[str, ...],
    force: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Build the TensorRT engine of BUNDLE, on the device that will run it, into BUNDLE/engines.

    TensorRT-RTX also builds without a GPU, for each --compute-capability.
    """
    from kvexport.cli.engine_tables import print_engine
    from kvexport.cli.options import progress_bar

    try:
        from kvexport.engine import EngineOptions, build_engine
    except ModuleNotFoundError as error:
        fix = "pip install 'kvexport[tensorrt]' on the device, or 'kvexport[rtx]' (Linux on x86_64, also without a GPU)"
        raise CannotRunHere(f"building an engine needs the package {error.name}", fix=fix) from error

    with progress_bar(quiet) as progress:
        record = build_engine(
            bundle,
            EngineOptions(**options),
            target=target,
            compute_capabilities=compute_capabilities,
            force=force,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps(record.to_json()))
    elif not quiet:
        print_engine(record, bundle)
