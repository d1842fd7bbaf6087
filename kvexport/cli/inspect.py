"""`kvexport inspect`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--verify", is_flag=True, help="Compare the SHA-256 of every file with the manifest; fail if one differs."
)
@click.option("--json", "as_json", is_flag=True, help="Print the manifest and the sizes as one JSON object.")
def command(bundle: Path, verify: bool, as_json: bool) -> None:
    """Show the contents of BUNDLE.

    Prints KV heads, width, method and errors of every layer, the size of the KV cache, and the files.
    """
    from kvexport.bundle import Bundle
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
