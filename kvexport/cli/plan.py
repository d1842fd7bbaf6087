"""`kvexport plan`: a config.json and a target in, what fits and how fast it will be out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from kvexport.cli.conversion import eviction_from
from kvexport.plan.memory import PRECISIONS


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--target",
    metavar="NAME|FILE",
    help="A device of `kvexport targets`, or a TOML file [default: sizes alone].",
)
@click.option(
    "--kv-heads",
    type=int,
    multiple=True,
    help="KV heads to keep; repeatable [default: all, half, a quarter].",
)
@click.option(
    "--dtype",
    type=click.Choice(PRECISIONS),
    multiple=True,
    help="Of the weights; repeatable [default: the target's].",
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    multiple=True,
    help="Tokens; repeatable [default: 2048, 8192, 32768].",
)
@click.option(
    "--kv-budget",
    metavar="TOKENS|SHARE",
    help="Hold at most so many tokens in each KV head, or that share of the model's longest sequence [default: all].",
)
@click.option(
    "--evict-skip-layers", metavar="LAYERS", help="Layers that hold every token, such as 0,1 [default: none]."
)
@click.option("--json", "as_json", is_flag=True, help="Print every figure as one JSON object.")
def command(
    model: Path,
    target: str | None,
    kv_heads: tuple[int, ...],
    dtype: tuple[str, ...],
    context: tuple[int, ...],
    as_json: bool,
    **budget: Any,
) -> None:
    """Say what fits a target, and how fast it is predicted to be. MODEL is a config.json or its folder: no weights are
    needed. For a bundle, also compare the prediction with what its builds and benchmarks measured."""
    from kvexport.cli.plan_tables import print_plan
    from kvexport.devices.targets import load_target
    from kvexport.plan import plan

    eviction = eviction_from({**budget, "evict": None, "protect_first": None, "protect_recent": None})
    device = None if target is None else load_target(target)
    found = plan(model, device, kv_heads=kv_heads, dtypes=dtype, contexts=context, eviction=eviction)
    if as_json:
        click.echo(json.dumps(found.to_json()))
    else:
        print_plan(found)
