"""`kvexport targets`."""

from __future__ import annotations

import json
from dataclasses import asdict

import click


@click.command()
@click.argument("target", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list, or one JSON object for TARGET.")
def command(target: str | None, as_json: bool) -> None:
    """List the target devices, or show the specifications of one TARGET and their sources.

    TARGET is a name from the list, or a TOML file.
    """
    from kvexport.cli.plan_tables import print_target, print_targets
    from kvexport.devices.targets import known_targets, load_target

    if target is None:
        targets = known_targets()
        if as_json:
            click.echo(json.dumps([asdict(each) for each in targets]))
        else:
            print_targets(targets)
        return
    device = load_target(target)
    if as_json:
        click.echo(json.dumps(asdict(device)))
    else:
        print_target(device)
