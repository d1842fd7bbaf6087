"""`kvexport run`: a bundle and a prompt in, text out as it is made."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from kvexport.cli.options import provider_option
from kvexport.errors import UsageError

if TYPE_CHECKING:
    from kvexport.runtime import Cache, Session, Stream

_NAMES = {"cpu": "the CPU", "cuda": "CUDA", "tensorrt": "TensorRT"}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, metavar="TEXT", help="What to continue; - reads standard input.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=200, show_default=True)
@click.option(
    "--temperature",
    type=float,
    help="0 takes the likeliest token [default: 0, and 1 with --top-k or --top-p].",
)
@click.option("--top-k", type=int, help="Draw from the K likeliest tokens.")
@click.option("--top-p", type=float, help="Draw from the likeliest tokens that reach this probability.")
@click.option("--seed", type=int, help="Makes drawing repeatable.")
@click.option(
    "--stop",
    metavar="TEXT",
    multiple=True,
    help="End where this text appears, and leave it out; several times: any.",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Go on from a cache that --save-cache wrote.",
)
@click.option(
    "--save-cache",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Read the prompt, write the cache to FILE, and generate nothing.",
)
@provider_option
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="Of one operator on the CPU [default: one a core]."
)
@click.option("--no-verify", is_flag=True, help="Start without hashing the weights.")
@click.option("--quiet", is_flag=True, help="The text alone.")
def command(
    bundle: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    stop: tuple[str, ...],
    cache: Path | None,
    save_cache: Path | None,
    provider: str,
    threads: int | None,
    no_verify: bool,
    quiet: bool,
) -> None:
    """Continue a prompt with BUNDLE; the prompt and what follows it go to standard output.

    A long beginning that several runs share is read once: --save-cache FILE writes what the model remembers of it, and
    --cache FILE goes on from there.
    """
    from kvexport.runtime import open_bundle

    if save_cache is not None:
        _require_nothing_generated()
    text = _standard_input() if prompt == "-" else prompt
    session = open_bundle(bundle, provider=provider, threads=threads, verify=not no_verify)
    held = None if cache is None else _loaded(session, cache)
    if save_cache is not None:
        said = _saved(session, text, held or session.new_cache(), save_cache)
        if not quiet:
            click.echo(said, err=True)
        return
    stream = session.stream(
        text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop or None,
        cache=held,
    )
    for piece in chain([text + next(stream, "")], stream):  # a prompt that is refused is not printed
        click.echo(piece, nl=False)  # and flush
    click.echo()
    if not quiet:
        click.echo(_summary(stream, session, held, stop), err=True)


def _require_nothing_generated() -> None:
    """
    Raises:
        UsageError: with --save-cache an option was given that says how to choose tokens.
    """
    context = click.get_current_context()
    for name in ("temperature", "top_k", "top_p", "seed", "stop"):
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            option = "--" + name.replace("_", "-")
            raise UsageError(
                "--save-cache generates nothing",
                got=option,
                fix=f"leave {option} out, and give it with --cache",
            )


def _loaded(session: Session, path: Path) -> Cache:
    """The one sequence of a saved cache."""
    cache = session.load(path)
    if cache.batch != 1:
        raise UsageError(
            f"the cache {path} holds several sequences", got=cache.batch, expected=1, fix="load it in Python"
        )
    return cache


def _saved(session: Session, text: str, cache: Cache, path: Path) -> str:
    """Read a text, write the cache; what was written."""
    from kvexport.cli.report import size

    before = int(cache.lengths[0])
    session.prefill(text, cache=cache)
    cache.save(path)
    tokens = int(cache.lengths[0])
    read = f"{tokens} tokens" + (f", {before} of them from --cache" if before else "")
    return f"kvexport: wrote {path}: {read}, {size(path.stat().st_size)}"


def _standard_input() -> str:
    """All of standard input, without the line break that ends it."""
    if sys.stdin is None:  # closed by whoever started us
        raise UsageError("standard input is closed", fix="give the prompt with --prompt TEXT")
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            "standard input is not UTF-8 text", got=f"byte {error.object[error.start]:#04x} at {error.start}"
        ) from error
    return text.removesuffix("\n").removesuffix("\r")


def _summary(stream: Stream, session: Session, cache: Cache | None, stop: tuple[str, ...]) -> str:
    """Why a stream that is whole ended, and what it took."""
    from kvexport.cli.report import size

    assert stream.generation is not None
    ended = {
        "stop": "the model ended, or a --stop text came" if stop else "the model ended",
        "length": "--max-new-tokens reached",
        "capacity": "the bundle's capacity reached",
    }[stream.generation.finish_reason]
    prefill = _speed(stream.timing.prefill_tokens, stream.timing.prefill_seconds)
    decode = _speed(stream.timing.decode_tokens, stream.timing.decode_seconds)
    (length,) = session.lengths if cache is None else cache.lengths
    return (
        f"kvexport: {ended}; prefill {prefill}, decode {decode} on {_NAMES[session.provider]}; "
        f"KV cache {size(session.bundle.kv_bytes(int(length)))} in use, {size(session.memory(cache).bytes_allocated)} allocated"
    )


def _speed(tokens: int, seconds: float) -> str:
    return f"{tokens} tokens" + (f" at {tokens / seconds:.0f}/s" if tokens and seconds else "")
