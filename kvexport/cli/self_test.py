"""`kvexport self-test`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvexport.cli.options import provider_option
from kvexport.errors import GateFailed

if TYPE_CHECKING:
    from kvexport.runtime.self_test.verdict import SelfTestReport


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@provider_option
@click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON object.")
@click.option("--quiet", is_flag=True, help="Print no table.")
def command(bundle: Path, provider: str, as_json: bool, quiet: bool) -> None:
    """Check that BUNDLE computes its recorded reference outputs on this machine.

    Checks a prompt that is processed at once, the same prompt token by token, and greedy generation. Takes
    seconds, and needs no more packages than running the bundle. The verdict is ok, or names the
    part that is wrong: weights, engine, precision or cache. Exits with 1 unless it is ok.
    """
    from kvexport.runtime.self_test.verdict import self_test

    report = self_test(bundle, provider)
    if as_json:
        click.echo(json.dumps(report.to_json()))
    elif not quiet:
        _print(report)
    if report.verdict != "ok":
        raise GateFailed(f"{bundle}: {report.verdict}: {report.message}", fix=report.fix)


def _print(report: SelfTestReport) -> None:
    from kvexport.cli.report import PlainConsole, plain_table

    out = PlainConsole()
    if report.checks:
        table = plain_table("", "tokens", "logits, error / rms", "keys and values, error of norms", "")
        for check in report.checks:
            verdict = "ok" if check.first is None else "FAILED"
            table.add_row(check.name, str(check.rows), f"{check.logits:.2e}", f"{check.norms:.2e}", verdict)
        table.add_row("tolerance", "", f"{report.tolerance.logits:g}", f"{report.tolerance.norms:g}", "")
        out.print(table)
    details = report.message
    if report.continuation:  # none in half precision if rounding can change the first token
        details = f"{report.generated} of {report.continuation} generated tokens as in PyTorch; {details}"
    out.print_line(f"{report.verdict} ({details})")
