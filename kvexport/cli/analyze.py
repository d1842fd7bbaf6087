"""`kvexport analyze`: a checkpoint in, a page of what its cache is like and what a conversion does to it out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from kvexport.cli.conversion import cache_options, calibration_options, plan_from, shape_options
from kvexport.convert.method_names import BEST, METHOD_NAMES, method_help


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="The HTML file to write; it must not exist.",
)
@click.option(
    "--method", type=click.Choice(METHOD_NAMES), default=BEST, show_default=True, help=method_help()
)
@cache_options
@shape_options
@calibration_options
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="Whose attention maps to show [default: text the model samples].",
)
@click.option("--tokens", type=click.IntRange(2, 256), default=48, show_default=True, help="Of that text.")
@click.option(
    "--pairs", metavar="Q:K,...", help="Query and key positions whose weights to list, such as 12:3,20:4."
)
@click.option("--force", is_flag=True, help="Replace the page that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the page's data as one JSON object.")
@click.option("--quiet", is_flag=True, help="No progress and no report.")
def command(
    checkpoint: Path,
    output: Path,
    text: Path | None,
    tokens: int,
    pairs: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Show what CHECKPOINT's cache is like and what a conversion does to it, as one HTML page that loads nothing.

    Spectra of keys and values, similarity of heads, predicted and measured errors, attention maps of the original
    and the compressed model side by side. No converted model is written.
    """
    from kvexport.analyze import analyze, render, require_page, save
    from kvexport.cli.options import progress_bar
    from kvexport.cli.report import PlainConsole, layer_table

    require_page(output, force=force)
    plan = plan_from(options)
    with progress_bar(quiet) as progress:
        found = analyze(checkpoint, plan, progress, text=text, tokens=tokens, pairs=pairs)
    save(render(found), output, force=force)
    if as_json:
        click.echo(json.dumps(found.to_json()))
    elif not quiet:
        out = PlainConsole()
        out.print(layer_table(layer.report for layer in found.layers))
        cost = found.divergence
        out.say(
            f"\nmean KL to the original: {cost.mean_kl:.5f} nats per token, on {cost.tokens} held-out tokens"
        )
        out.say(f"wrote {output}")
