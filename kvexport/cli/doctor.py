"""`kvexport doctor`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from kvexport.errors import CannotRunHere

if TYPE_CHECKING:
    from rich.table import Table

    from kvexport.doctor import Diagnosis, TargetCheck

_INDENT = 11  # width of the column of commands


@click.command()
@click.option(
    "--target",
    metavar="NAME|FILE",
    help="Target device, from `kvexport targets` or a TOML file, to check for building and running its "
    "engine here.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as one JSON object.")
def command(target: str | None, as_json: bool) -> None:
    """Show this machine, the installed packages, and what is missing for each command.

    With --target, exits with 3 if the target's engine can neither be built nor run on this machine.
    """
    from kvexport.devices.targets import load_target
    from kvexport.doctor import examine

    diagnosis = examine(None if target is None else load_target(target))
    if as_json:
        click.echo(json.dumps(diagnosis.to_json()))
    else:
        _print(diagnosis)
    check = diagnosis.target
    if check is not None and not (check.builds or check.runs):
        raise CannotRunHere(
            f"an engine for {check.target} can neither be built nor run on this machine",
            got="missing: " + "; ".join(check.reasons),
            fix="; ".join(dict.fromkeys(check.reasons.values())),
        )


def _print(diagnosis: Diagnosis) -> None:
    from kvexport.cli.report import PlainConsole, plain_table

    out = PlainConsole()
    out.print(_machine_table(diagnosis))
    out.print()
    packages = plain_table("package", "installed", "required", "")
    for package in diagnosis.packages:
        state = "ok" if package.usable else "too old" if package.version else "-"
        packages.add_row(package.name, package.version or "-", package.floor or "any", state)
    out.print(packages)
    out.print()
    for command in diagnosis.verbs:
        if command.lacks:
            fixes = "; ".join(dict.fromkeys(command.lacks.values()))
            out.print_line(f"{command.name:<{_INDENT}}missing: {', '.join(command.lacks)}")
            out.print_line(f"{'':<{_INDENT}}fix: {fixes}")
        else:
            out.print_line(f"{command.name:<{_INDENT}}works")
    if diagnosis.target is not None:
        out.print()
        out.print_line(_target_line(diagnosis.target))
        for missing, fix in diagnosis.target.reasons.items():
            out.print_line(f"{'':<{_INDENT}}missing: {missing}")
            out.print_line(f"{'':<{_INDENT}}fix: {fix}")


def _machine_table(diagnosis: Diagnosis) -> Table:
    from kvexport.cli.report import facts_table, size

    table, machine = facts_table(), diagnosis.machine
    table.add_row("kvexport", f"{diagnosis.kvexport}, Python {machine.python}")
    memory = "" if machine.memory is None else f", {size(machine.memory)} memory"
    table.add_row("machine", f"{machine.architecture}, {machine.cpus} CPUs{memory}")
    if machine.jetson is not None:
        system = f"L4T {machine.l4t or 'unknown'}, JetPack {machine.jetpack or 'unknown'}"
        table.add_row("Jetson", f"{machine.jetson}, {system}")
    for gpu in machine.gpus:
        memory = "memory shared with the CPU" if gpu.memory is None else f"{size(gpu.memory)} memory"
        table.add_row("GPU", f"{gpu.name}, SM {gpu.sm}, {memory}, driver {gpu.driver or 'unknown'}")
    if not machine.gpus:
        table.add_row("GPU", "no NVIDIA GPU found")
    if diagnosis.providers:
        table.add_row("ONNX Runtime", ", ".join(diagnosis.providers))
    return table


def _target_line(check: TargetCheck) -> str:
    if check.lowering == "ort":
        runs = "runs" if check.runs else "does not run"
        return f"{check.target}: needs no engine; a bundle {runs} on this machine (lowering ort)"
    possible = {
        (True, True): "can be built and run",
        (True, False): "can be built, but not run",
        (False, True): "can be run, but not built",
        (False, False): "can neither be built nor run",
    }[check.builds, check.runs]
    return f"{check.target}: an engine {possible} on this machine (lowering {check.lowering})"
