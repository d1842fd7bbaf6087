"""`kvexport plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from kvexport.cli.conversion import eviction_request
from kvexport.plan.memory import PRECISIONS


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--target",
    metavar="NAME|FILE",
    help="Target device, from `kvexport targets` or a TOML file.  [default: none, which predicts sizes only]",
)
@click.option(
    "--kv-heads",
    type=int,
    multiple=True,
    help="Number of KV heads; may be given several times.  [default: all, a half and a quarter]",
)
@click.option(
    "--dtype",
    type=click.Choice(PRECISIONS),
    multiple=True,
    help="Data type of the weights; may be given several times.  [default: those of the target]",
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    multiple=True,
    help="Context length in tokens; may be given several times.  [default: 2048, 8192, 32768]",
)
@click.option(
    "--kv-budget",
    metavar="TOKENS|FRACTION",
    help="Maximum number of tokens in the KV cache of a sequence, or a fraction of the model's maximum "
    "length.  [default: no eviction]",
)
@click.option(
    "--evict-skip-layers",
    metavar="LAYERS",
    help="Layers that keep every token, as comma-separated numbers from 0, such as 0,1.  [default: none]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the predictions as one JSON object.")
def command(
    model: Path,
    target: str | None,
    kv_heads: tuple[int, ...],
    dtype: tuple[str, ...],
    context: tuple[int, ...],
    as_json: bool,
    **budget: Any,
) -> None:
    """Predict whether MODEL fits a target, and its speed there.

    MODEL is a config.json, its folder, or a bundle. No weights are needed. For a bundle, the predictions are
    compared with what its engine builds and benchmarks measured.
    """
    from kvexport.cli.plan_tables import print_plan
    from kvexport.devices.targets import load_target
    from kvexport.plan import plan

    eviction = eviction_request({**budget, "evict": None, "protect_first": None, "protect_recent": None})
    device = None if target is None else load_target(target)
    predictions = plan(model, device, kv_heads=kv_heads, dtypes=dtype, contexts=context, eviction=eviction)
    if as_json:
        click.echo(json.dumps(predictions.to_json()))
    else:
        print_plan(predictions)
