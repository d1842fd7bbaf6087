"""`kvexport doctor`: what this machine has and lacks, and the command that fixes it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from kvexport.errors import CannotRunHere

if TYPE_CHECKING:
    from kvexport.doctor import Diagnosis, TargetCheck


@click.command()
@click.option(
    "--target", metavar="NAME|FILE", help="Also say whether this target's engine can be built and run here."
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def command(target: str | None, as_json: bool) -> None:
    """Say what is installed, which verbs work here, and what is missing. With --target, exit code 3 if its engine can
    neither be built nor run here."""
    from kvexport.devices.targets import load_target
    from kvexport.doctor import examine

    found = examine(None if target is None else load_target(target))
    if as_json:
        click.echo(json.dumps(found.to_json()))
    else:
        _print(found)
    check = found.target
    if check is not None and not (check.builds or check.runs):
        raise CannotRunHere(
            f"an engine for {check.target} can neither be built nor run here",
            got="it lacks " + "; ".join(check.reasons),
            fix="; ".join(dict.fromkeys(check.reasons.values())),
        )


def _print(found: Diagnosis) -> None:
    from kvexport.cli.report import PlainConsole, facts_table, plain_table, size

    out, machine = PlainConsole(), found.machine
    table = facts_table()
    table.add_row("kvexport", f"{found.kvexport}, Python {machine.python}")
    memory = "" if machine.memory is None else f", {size(machine.memory)}"
    table.add_row("machine", f"{machine.architecture}, {machine.cpus} CPUs{memory}")
    if machine.jetson is not None:
        system = f"L4T {machine.l4t or 'unknown'}, JetPack {machine.jetpack or 'unknown'}"
        table.add_row("Jetson", f"{machine.jetson}, {system}")
    for gpu in machine.gpus:
        memory = "memory shared with the CPU" if gpu.memory is None else size(gpu.memory)
        table.add_row("GPU", f"{gpu.name}, SM {gpu.sm}, {memory}, driver {gpu.driver or 'unknown'}")
    if not machine.gpus:
        table.add_row("GPU", "no NVIDIA GPU is seen")
    if found.providers:
        table.add_row("providers", ", ".join(found.providers))
    out.print(table)
    out.print()
    packages = plain_table("package", "installed", "needed", "")
    for package in found.packages:
        state = "ok" if package.usable else "too old" if package.version else "-"
        packages.add_row(package.name, package.version or "-", package.floor or "any", state)
    out.print(packages)
    out.print()
    for verb in found.verbs:
        if verb.lacks:
            fixes = "; ".join(dict.fromkeys(verb.lacks.values()))
            out.say(f"{verb.name:<10} lacks {', '.join(verb.lacks)}\n{'':<10} fix: {fixes}")
        else:
            out.say(f"{verb.name:<10} works")
    if found.target is not None:
        out.print()
        out.say(_verdict(found.target))


def _verdict(check: TargetCheck) -> str:
    if check.lowering == "ort":
        lines = [
            f"{check.target}: needs no engine; a bundle {'runs' if check.runs else 'cannot be run'} here (lowering ort)"
        ]
        return "\n".join(lines + _reasons(check))
    able = {
        (True, True): "can be built and run",
        (True, False): "can be built, not run",
        (False, True): "can be run, not built",
    }
    said = able.get((check.builds, check.runs), "can neither be built nor run")
    lines = [f"{check.target}: an engine {said} here (lowering {check.lowering})"]
    return "\n".join(lines + _reasons(check))


def _reasons(check: TargetCheck) -> list[str]:
    return [f"{'':<10} lacks {what}\n{'':<10} fix: {fix}" for what, fix in check.reasons.items()]
