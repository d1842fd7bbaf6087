"""`kvexport evaluate`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import click

from kvexport.cli.options import device_option, provider_option
from kvexport.errors import GateFailed, UsageError


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--against",
    "checkpoint",
    type=click.Path(path_type=Path),
    required=True,
    help="Checkpoint that the bundle was built from.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    required=True,
    help="Text file, or JSON lines with a `text` field.",
)
@click.option(
    "--length",
    type=click.IntRange(min=2),
    help="Length of a window of text in tokens.  [default: 256, or the bundle's capacity if that is less]",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    help="Maximum number of windows, evenly spread over the text.  [default: all]",
)
@click.option(
    "--max-kl",
    type=float,
    help="Maximum mean KL divergence from the checkpoint, in nats per token; exits with 1 above it.  "
    "[default: no limit]",
)
@provider_option
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON object.")
@click.option("--quiet", is_flag=True, help="Print no progress and no table.")
def command(
    bundle: Path,
    checkpoint: Path,
    text: Path,
    length: int | None,
    samples: int | None,
    max_kl: float | None,
    provider: str,
    device: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure BUNDLE's loss from compression on a text: perplexity before and after, and mean KL."""
    if max_kl is not None and not 0 <= max_kl < math.inf:
        raise UsageError(
            "--max-kl must be a finite number >= 0", got=max_kl, expected=">= 0, in nats per token"
        )
    from kvexport.cli.options import progress_bar
    from kvexport.cli.report import print_evaluation
    from kvexport.validate.evaluate import evaluate

    with progress_bar(quiet) as progress:
        evaluation = evaluate(
            bundle,
            checkpoint,
            text,
            progress,
            length=length,
            samples=samples,
            provider=provider,
            device=device,
        )
    if as_json:
        click.echo(json.dumps(evaluation.to_json()))
    elif not quiet:
        print_evaluation(evaluation)
    kl = evaluation.divergence.mean_kl
    if max_kl is not None and not kl <= max_kl:
        raise GateFailed(
            "the mean KL divergence from the checkpoint must not exceed --max-kl",
            got=f"{kl:.6g} nats per token",
            expected=f"at most {max_kl:g}",
        )
