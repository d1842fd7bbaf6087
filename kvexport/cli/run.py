"""`kvexport run`: a bundle and a prompt in, text out as it is made."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from kvexport.errors import UsageError


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, metavar="TEXT", help="What to continue; - reads standard input.")
@click.option("--max-new-tokens", type=click.IntRange(min=0), default=200, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", type=int, help="Draw from the K likeliest tokens.")
@click.option("--top-p", type=float, help="Draw from the likeliest tokens that reach this probability.")
@click.option("--seed", type=int, help="Makes drawing repeatable.")
@click.option("--threads", type=click.IntRange(min=1), help="Of one operator [default: one a core].")
@click.option("--quiet", is_flag=True, help="The text alone.")
def command(
    bundle: Path, prompt: str, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None,
    seed: int | None, threads: int | None, quiet: bool,
) -> None:  # fmt: skip
    """Continue a prompt with BUNDLE; the prompt and what follows it go to standard output."""
    from kvexport.runtime import open_bundle

    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise UsageError("the prompt is empty", fix="give a text with --prompt, or on standard input with --prompt -")
    session = open_bundle(bundle, threads=threads)
    pieces = session.stream(text, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    for index, piece in enumerate(pieces):
        click.echo((text if index == 0 else "") + piece, nl=False)
        sys.stdout.flush()
    click.echo()
    if not quiet:
        click.echo(_summary(session.timing.decode_tokens, session.timing.decode_seconds, session.memory()), err=True)


def _summary(tokens: int, seconds: float, memory: dict[str, int]) -> str:
    speed = f"{tokens / seconds:.1f} tokens/s" if seconds else "no decode steps"
    used, allocated = memory["kv_bytes_used"] / 1024, memory["kv_bytes_allocated"] / 1024
    return f"kvexport: {speed}; KV cache {used:.1f} KiB in use, {allocated:.1f} KiB allocated"
