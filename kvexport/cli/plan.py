"""`kvexport plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from kvexport.bundle.formats import BITS, BYTES
from kvexport.cli.conversion import (
    embedding_weights_option,
    eviction_request,
    head_weights_option,
    weight_block_option,
)
from kvexport.quantize.method_names import DEFAULT_BITS


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--target",
    metavar="NAME|FILE",
    help="Target device, from `kvexport targets` or a TOML file.  [default: none, which predicts sizes only]",
)
@click.option(
    "--jetpack", metavar="VERSION", help="JetPack version of the target, which determines its TensorRT."
)
@click.option(
    "--kv-heads",
    type=int,
    multiple=True,
    help="Number of KV heads; may be given several times.  [default: all, a half and a quarter]",
)
@click.option(
    "--dtype",
    type=click.Choice(tuple(BYTES)),
    help="Data type of computation and KV cache, and of weights without a format of their own.  "
    "[default: float16; float32 with ONNX Runtime]",
)
@click.option(
    "--weights",
    type=click.Choice(tuple(BITS)),
    multiple=True,
    help="Format of the weights of the layers; may be given several times.  [default: --dtype, int8, int4]",
)
@head_weights_option
@embedding_weights_option
@weight_block_option
@click.option(
    "--weight-bits",
    type=click.FloatRange(min=0, min_open=True),
    metavar="BITS",
    help="Mean number of bits of int4 weights, with their scales: the most sensitive weights get 8 bits. "
    "Head and embedding count, unless their formats are given.  "
    f"[default: {DEFAULT_BITS:g}, or the least possible if that is more]",
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
    jetpack: str | None,
    kv_heads: tuple[int, ...],
    dtype: str | None,
    weights: tuple[str, ...],
    head_weights: str | None,
    embedding_weights: str | None,
    weight_block: str | None,
    weight_bits: float | None,
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
    predictions = plan(
        model,
        device,
        jetpack=jetpack,
        kv_heads=kv_heads,
        dtype=dtype,
        weights=weights,
        head_weights=head_weights,
        embedding_weights=embedding_weights,
        weight_block=None if weight_block is None else int(weight_block),
        weight_bits=weight_bits,
        contexts=context,
        eviction=eviction,
    )
    if as_json:
        click.echo(json.dumps(predictions.to_json()))
    else:
        print_plan(predictions)
