"""`kvexport self-test`: a bundle in, what it computes here against what it computed when it was built, and a verdict."""

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
@click.option("--json", "as_json", is_flag=True, help="Print every figure as one JSON object.")
@click.option("--quiet", is_flag=True, help="No table: the exit code alone.")
def command(bundle: Path, provider: str, as_json: bool, quiet: bool) -> None:
    """Run the reference vectors of BUNDLE as it is deployed here: right at once, right token by token, right to generate?

    Needs no more than running it does, and a second or two. Exit code 1 unless the verdict is ok; the others are: weights,
    engine, precision, cache.
    """
    from kvexport.runtime.self_test.verdict import self_test

    report = self_test(bundle, provider)
    if as_json:
        click.echo(json.dumps(report.to_json()))
    elif not quiet:
        _print(report)
    if report.verdict != "ok":
        raise GateFailed(f"{bundle}: {report.verdict}: {report.said}", fix=report.fix)


def _print(report: SelfTestReport) -> None:
    from kvexport.cli.report import PlainConsole, plain_table

    out = PlainConsole()
    if report.checks:
        table = plain_table("", "tokens", "logits, error / rms", "keys and values, error of norms", "")
        for check in report.checks:
            verdict = "ok" if check.first is None else "FAILED"
            table.add_row(check.name, str(check.rows), f"{check.logits:.2e}", f"{check.norms:.2e}", verdict)
        table.add_row("allowed", "", f"{report.tolerance.logits:g}", f"{report.tolerance.norms:g}", "")
        out.print(table)
    told = f"generated {report.generated} of {report.continuation} tokens as PyTorch; "
    generated = (
        told if report.continuation else ""
    )  # in half precision the first may be a choice that rounding can turn
    out.say(f"{report.verdict} ({generated}{report.said})")
