"""`kvexport analyze`: a checkpoint in, a page of what its cache is like and what a conversion does to it out."""

from __future__ import annotations

import json
from pathlib import Path

import click

from kvexport.cli.conversion import METHODS, calibration_options, recipe_from


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The HTML file to write; it must not exist.")
@click.option("--kv-heads", type=int, help="KV heads to keep; must divide the model's number [default: half].")
@click.option("--kv-ratio", type=float, help="The same as a share: 0.5, 0.25, ...")
@click.option("--method", type=click.Choice(METHODS), default="auto", show_default=True, help="How heads are merged.")
@calibration_options
@click.option("--text", type=click.Path(path_type=Path), help="Whose attention maps to show [default: text the model samples].")
@click.option("--tokens", type=click.IntRange(2, 256), default=48, show_default=True, help="Of that text.")
@click.option("--pairs", metavar="Q:K,...", help="Query and key positions whose weights to list, such as 12:3,20:4.")
@click.option("--force", is_flag=True, help="Replace the page that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the page's data as one JSON object.")
@click.option("--quiet", is_flag=True, help="No progress and no report.")
def command(
    checkpoint: Path, output: Path, kv_heads: int | None, kv_ratio: float | None, method: str, calibration: str | None,
    samples: int | None, length: int | None, seed: int | None, text: Path | None, tokens: int, pairs: str | None,
    force: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Show what CHECKPOINT's cache is like and what a conversion does to it, as one HTML page that loads nothing.

    Spectra of keys and values, similarity of heads, predicted and measured errors, attention maps of the original
    and the compressed model side by side. No converted model is written.
    """
    from kvexport.analyze import analyze, render, require_page, save
    from kvexport.cli.options import progress_bar
    from kvexport.cli.report import PlainConsole, layer_table

    require_page(output, force=force)
    recipe = recipe_from(calibration, samples, length, seed)
    with progress_bar(quiet) as progress:
        found = analyze(
            checkpoint,
            recipe,
            progress,
            kv_heads=kv_heads,
            kv_ratio=kv_ratio,
            method=method,
            text=text,
            tokens=tokens,
            pairs=pairs,
        )
    save(render(found), output, force=force)
    if as_json:
        click.echo(json.dumps(found.to_json()))
    elif not quiet:
        out = PlainConsole()
        out.print(layer_table(layer.report for layer in found.layers))
        cost = found.divergence
        out.say(f"\nmean KL to the original: {cost.mean_kl:.5f} nats per token, on {cost.tokens} held-out tokens")
        out.say(f"wrote {output}")
