"""`kvexport validate`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from kvexport.cli.options import provider_option
from kvexport.errors import GateFailed


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@provider_option
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@click.option("--quiet", is_flag=True, help="Print no progress and no table.")
def command(bundle: Path, provider: str, as_json: bool, quiet: bool) -> None:
    """Compare BUNDLE's outputs with its PyTorch reference: every layer, in a prefill and 64 decode steps.

    Exits with 1 if outputs differ from the reference by more than the tolerance of the bundle's data type.
    """
    from kvexport.cli.options import progress_bar
    from kvexport.cli.report import print_validation
    from kvexport.validate import validate_bundle

    with progress_bar(quiet) as progress:
        report = validate_bundle(bundle, progress, provider)
    if as_json:
        click.echo(json.dumps(report.to_json()))
    elif not quiet:
        print_validation(report)
    if report.failures:
        raise GateFailed(
            f"{bundle} does not match its PyTorch reference",
            got="\n".join(report.failures),
            fix="build the bundle again: kvexport build CHECKPOINT -o BUNDLE",
        )
