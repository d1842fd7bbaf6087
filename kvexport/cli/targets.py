"""`kvexport targets`: the devices that kvexport knows, and where each figure is from."""

from __future__ import annotations

import json
from dataclasses import asdict

import click


@click.command()
@click.argument("target", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list, or one JSON object for TARGET.")
def command(target: str | None, as_json: bool) -> None:
    """List the devices that kvexport knows, or show TARGET, a name or a TOML file, with its sources."""
    from kvexport.cli.plan_tables import print_target, print_targets
    from kvexport.devices.targets import known_targets, load_target

    if target is None:
        targets = known_targets()
        if as_json:
            click.echo(json.dumps([asdict(each) for each in targets]))
        else:
            print_targets(targets)
        return
    found = load_target(target)
    if as_json:
        click.echo(json.dumps(asdict(found)))
    else:
        print_target(found)
