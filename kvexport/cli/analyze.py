"""`kvexport analyze`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from kvexport.cli.conversion import (
    build_options,
    calibration_options,
    kv_size_options,
    method_option,
    no_cache_option,
    output_option,
    shape_options,
    statistics_option,
)
from kvexport.convert.method_names import BEST


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@output_option("HTML file")
@method_option(BEST)
@kv_size_options
@shape_options
@calibration_options
@statistics_option
@no_cache_option
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="Text file whose attention maps are shown.  [default: text sampled from the model]",
)
@click.option(
    "--tokens",
    type=click.IntRange(2, 256),
    default=48,
    show_default=True,
    help="Number of tokens in the attention maps.",
)
@click.option(
    "--pairs",
    metavar="Q:K,...",
    help="Query and key positions whose attention weights are listed, such as 12:3,20:4.",
)
@click.option("--force", is_flag=True, help="Replace an existing page.")
@click.option("--json", "as_json", is_flag=True, help="Print the data of the page as one JSON object.")
@click.option("--quiet", is_flag=True, help="Print no progress and no report.")
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
    """Write an HTML page on CHECKPOINT's KV cache and the effect of compression on it.

    The page shows spectra of keys and values, similarity of heads, predicted and measured errors, and
    attention maps of the original and the compressed model side by side. It loads nothing from the network.
    No converted model is written.
    """
    from kvexport.analyze import analyze, render, require_page, save
    from kvexport.cli.options import progress_bar
    from kvexport.cli.report import PlainConsole, layer_table

    require_page(output, force=force)
    with progress_bar(quiet) as progress:
        analysis = analyze(
            checkpoint, build_options(options), progress, text=text, tokens=tokens, pairs=pairs
        )
    save(render(analysis), output, force=force)
    if as_json:
        click.echo(json.dumps(analysis.to_json()))
    elif not quiet:
        out = PlainConsole()
        out.print(layer_table(layer.report for layer in analysis.layers))
        divergence = analysis.divergence
        out.print_line(
            f"\nmean KL to the original: {divergence.mean_kl:.5f} nats per token, on {divergence.tokens} "
            "held-out tokens"
        )
        out.print_line(f"wrote {output}")
