"""`kvexport run`: a bundle and a prompt in, text out as it is made."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvexport.cli.options import provider_option
from kvexport.errors import UsageError

if TYPE_CHECKING:
    from kvexport.runtime import Session
    from kvexport.runtime.generation import Timing

_NAMES = {"cpu": "the CPU", "cuda": "CUDA", "tensorrt": "TensorRT"}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, metavar="TEXT", help="What to continue; - reads standard input.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--temperature", type=float, help="0 takes the likeliest token [default: 0, and 1 with --top-k or --top-p].")
@click.option("--top-k", type=int, help="Draw from the K likeliest tokens.")
@click.option("--top-p", type=float, help="Draw from the likeliest tokens that reach this probability.")
@click.option("--seed", type=int, help="Makes drawing repeatable.")
@provider_option
@click.option("--threads", type=click.IntRange(1, 1024), help="Of one operator on the CPU [default: one a core].")
@click.option("--no-verify", is_flag=True, help="Start without hashing the weights.")
@click.option("--quiet", is_flag=True, help="The text alone.")
def command(
    bundle: Path, prompt: str, max_new_tokens: int, temperature: float | None, top_k: int | None, top_p: float | None,
    seed: int | None, provider: str, threads: int | None, no_verify: bool, quiet: bool,
) -> None:  # fmt: skip
    """Continue a prompt with BUNDLE; the prompt and what follows it go to standard output."""
    from kvexport.runtime import open_bundle

    text = _standard_input() if prompt == "-" else prompt
    session = open_bundle(bundle, provider=provider, threads=threads, verify=not no_verify)
    stream = session.stream(text, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    for piece in chain([text + next(stream, "")], stream):  # a prompt that is refused is not printed
        click.echo(piece, nl=False)  # and flush
    click.echo()
    if not quiet:
        assert stream.generation is not None
        click.echo(_summary(stream.timing, stream.generation.finish_reason, session), err=True)


def _standard_input() -> str:
    """All of standard input, without the line break that ends it."""
    if sys.stdin is None:  # closed by whoever started us
        raise UsageError("standard input is closed", fix="give the prompt with --prompt TEXT")
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            "standard input is not UTF-8 text", seen=f"byte {error.object[error.start]:#04x} at {error.start}"
        ) from error
    return text.removesuffix("\n").removesuffix("\r")


def _summary(timing: Timing, reason: str, session: Session) -> str:
    from kvexport.cli.report import size

    ended = {"stop": "the model ended", "length": "--max-new-tokens reached", "capacity": "the bundle's capacity reached"}
    prefill = _speed(timing.prefill_tokens, timing.prefill_seconds)
    decode = _speed(timing.decode_tokens, timing.decode_seconds)
    used = session.bundle.kv_bytes(timing.prefill_tokens + timing.decode_tokens)
    return (
        f"kvexport: {ended[reason]}; prefill {prefill}, decode {decode} on {_NAMES[session.provider]}; "
        f"KV cache {size(used)} in use, {size(session.memory().bytes_allocated)} allocated"
    )


def _speed(tokens: int, seconds: float) -> str:
    return f"{tokens} tokens" + (f" at {tokens / seconds:.0f}/s" if seconds else "")
