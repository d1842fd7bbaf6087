"""`kvexport validate`: a bundle in, a verdict out."""

from __future__ import annotations

import json
from pathlib import Path

import click

from kvexport.cli.options import provider_option
from kvexport.errors import GateFailed


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@provider_option
@click.option("--json", "as_json", is_flag=True, help="Print every figure as one JSON object.")
@click.option("--quiet", is_flag=True, help="No progress and no table: the exit code alone.")
def command(bundle: Path, provider: str, as_json: bool, quiet: bool) -> None:
    """Prove BUNDLE against its PyTorch twin: every layer, a prefill and 64 decode steps. Exit code 1 if it is not it."""
    from kvexport.cli.options import progress_bar
    from kvexport.cli.report import print_validation
    from kvexport.validate import validate

    with progress_bar(quiet) as progress:
        report = validate(bundle, progress, provider)
    if as_json:
        click.echo(json.dumps(report.to_json()))
    elif not quiet:
        print_validation(report)
    if report.failures:
        raise GateFailed(
            f"{bundle} is not its PyTorch twin:\n" + "\n".join(report.failures), fix="build the bundle again"
        )
