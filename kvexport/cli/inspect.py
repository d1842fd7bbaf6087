"""`kvexport inspect`: a bundle in, what it says of itself out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Hash every file, and fail if one is not as it was written.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(bundle: Path, verify: bool, as_json: bool) -> None:
    """Show what BUNDLE holds: heads, widths, method and error of every layer, KV bytes per token, files."""
    from kvexport.bundle.bundle import Bundle
    from kvexport.cli.report import print_bundle

    opened = Bundle.open(bundle)
    if verify:
        opened.verify()
    if as_json:
        sizes = {
            "kv_bytes_per_token": opened.kv_bytes_per_token,
            "kv_bytes_per_token_original": opened.kv_bytes_per_token_original,
        }
        click.echo(json.dumps({**asdict(opened), "path": str(opened.path), **sizes, "verified": verify}))
    else:
        print_bundle(opened, verify)
