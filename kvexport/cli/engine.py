"""`kvexport engine`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from kvexport.errors import CannotRunHere
from kvexport.packages import install_command


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--target",
    metavar="NAME|FILE",
    help="Target device, from `kvexport targets` or a TOML file.  [default: this machine]",
)
@click.option(
    "--compute-capability",
    "compute_capabilities",
    multiple=True,
    metavar="X.Y",
    help="Compute capability of the GPUs to build for, with TensorRT-RTX and without a GPU; may be given "
    "several times.",
)
@click.option(
    "--capacity", type=int, help="Maximum sequence length in tokens.  [default: the bundle's capacity]"
)
@click.option(
    "--chunk",
    type=int,
    help="Maximum number of prompt tokens that are processed in one call.  [default: 128, or the capacity "
    "if that is less]",
)
@click.option(
    "--batch",
    type=int,
    default=1,
    show_default=True,
    help="Number of sequences that are decoded together.",
)
@click.option(
    "--workspace",
    type=int,
    metavar="MIB",
    help="Maximum scratch memory of a kernel in MiB.  [default: TensorRT's]",
)
@click.option(
    "--refit",
    is_flag=True,
    help="Build the plan without weights; they are loaded from the bundle when it is opened.",
)
@click.option(
    "--version-compatible", is_flag=True, help="Build a plan that later TensorRT versions can load."
)
@click.option(
    "--hardware-compatible",
    is_flag=True,
    help="Build a plan that runs on all desktop GPUs from the Ampere generation on.",
)
@click.option(
    "--optimization-level",
    type=int,
    metavar="0-5",
    help="Optimization level of TensorRT's builder; higher builds longer.  [default: TensorRT's]",
)
@click.option(
    "--lowering",
    help="Form of the graph: std24 or decomposed17.  [default: the first that this TensorRT supports]",
)
@click.option("--force", is_flag=True, help="Replace an existing engine.")
@click.option("--quiet", is_flag=True, help="Print no progress and no table.")
@click.option("--json", "as_json", is_flag=True, help="Print the record of the build as one JSON object.")
def command(
    bundle: Path,
    target: str | None,
    compute_capabilities: tuple[str, ...],
    force: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Build a TensorRT engine from BUNDLE into BUNDLE/engines, on the device that will run it.

    TensorRT-RTX can also build on a machine without a GPU, for each --compute-capability.
    """
    from kvexport.cli.engine_tables import print_engine
    from kvexport.cli.options import progress_bar

    try:
        from kvexport.engine import EngineOptions, build_engine
    except ModuleNotFoundError as error:
        fix = (
            f"{install_command('tensorrt')} on the device, "
            f"or {install_command('tensorrt-rtx')} (Linux on x86_64, also without a GPU)"
        )
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
