"""`kvexport compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kvexport.cli.conversion import build_options, conversion_options, method_option, output_option


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@output_option("Checkpoint directory")
@method_option("fold")
@conversion_options
@click.option("--force", is_flag=True, help="Replace an existing checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@click.option("--quiet", is_flag=True, help="Print no progress and no report.")
def command(checkpoint: Path, output: Path, force: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Convert a Hugging Face CHECKPOINT to a Hugging Face checkpoint with fewer KV heads.

    The result is of the model's own class in transformers, so that other programs can use it. It is read
    back before the command ends, and its logits are compared with those of the converted model, by
    transformers, too. For a model with RoPE, --method must be fold or mean-pool, and the loss is larger than
    that of a bundle, whose keys may be projected after rotation: compare the reports of both. A model whose
    keys are normalised or clipped needs a bundle.
    """
    from kvexport.build import compress
    from kvexport.cli.options import progress_bar
    from kvexport.cli.report import print_build

    with progress_bar(quiet) as progress:
        report = compress(checkpoint, output, build_options(options), progress, force=force)
    print_build(report, output, as_json=as_json, quiet=quiet)
