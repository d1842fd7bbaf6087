"""`kvexport evaluate`: a bundle, its checkpoint and a text in, what compression cost out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import click

from kvexport.cli.options import provider_option
from kvexport.errors import GateFailed, UsageError


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--against",
    "checkpoint",
    type=click.Path(path_type=Path),
    required=True,
    help="The checkpoint it was built from.",
)
@click.option(
    "--text", type=click.Path(path_type=Path), required=True, help="Text, or JSON lines with a `text` field."
)
@click.option(
    "--length", type=click.IntRange(min=2), default=256, show_default=True, help="Tokens in a window."
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    help="The most windows to use, spread over the text [default: all].",
)
@click.option("--max-kl", type=float, help="Exit with 1 if the mean KL is above this, in nats per token.")
@provider_option
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one JSON object.")
@click.option("--quiet", is_flag=True, help="No progress and no table.")
def command(
    bundle: Path,
    checkpoint: Path,
    text: Path,
    length: int,
    samples: int | None,
    max_kl: float | None,
    provider: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure what compression cost: BUNDLE's predictions against the trained model's on a text."""
    if max_kl is not None and not 0 <= max_kl < math.inf:
        raise UsageError("--max-kl is no bound", got=max_kl, expected="0 or more, in nats per token")
    from kvexport.cli.options import progress_bar
    from kvexport.cli.report import print_evaluation
    from kvexport.validate.evaluate import evaluate

    with progress_bar(quiet) as progress:
        result = evaluate(
            bundle, checkpoint, text, progress, length=length, samples=samples, provider=provider
        )
    if as_json:
        click.echo(json.dumps(result.to_json()))
    elif not quiet:
        print_evaluation(result)
    kl = result.divergence.mean_kl
    if max_kl is not None and not kl <= max_kl:
        raise GateFailed(
            "the bundle is farther from the original than --max-kl allows",
            got=f"{kl:.6g}",
            expected=f"at most {max_kl:g}",
        )
