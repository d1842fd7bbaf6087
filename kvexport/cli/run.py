"""`kvexport run`."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from kvexport.cli.options import provider_option, threads_option
from kvexport.errors import UsageError

if TYPE_CHECKING:
    from kvexport.runtime import Cache, Session, Stream

_PROVIDERS = {"cpu": "the CPU", "cuda": "CUDA", "tensorrt": "TensorRT"}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--prompt", required=True, metavar="TEXT", help="Text to continue; - reads it from standard input."
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    help="Maximum number of tokens to generate.",
)
@click.option(
    "--temperature",
    type=float,
    help="Sampling temperature; 0 is greedy decoding.  [default: 0; 1 with --top-k or --top-p]",
)
@click.option("--top-k", type=int, help="Sample from the K most likely tokens only.  [default: all]")
@click.option(
    "--top-p",
    type=float,
    help="Sample from the most likely tokens whose probabilities add up to P.  [default: 1]",
)
@click.option("--seed", type=int, help="Random seed of sampling.  [default: a new one in every run]")
@click.option(
    "--stop",
    metavar="TEXT",
    multiple=True,
    help="Text at which generation ends, and which is not printed; may be given several times.",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Cache from --save-cache, which the prompt continues.",
)
@click.option(
    "--save-cache",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File to write the cache to after the prompt; nothing is generated.",
)
@provider_option
@threads_option
@click.option("--no-verify", is_flag=True, help="Do not hash the weights before the start.")
@click.option("--quiet", is_flag=True, help="Print the text only, without speed and memory use.")
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
    """Generate text with BUNDLE: print the prompt and its continuation to standard output.

    A prompt prefix that several runs share needs one prefill only: --save-cache FILE saves the cache after
    it, and --cache FILE continues from there.
    """
    from kvexport.files.malloc import map_large_blocks
    from kvexport.runtime import open_bundle

    map_large_blocks()
    if save_cache is not None:
        _reject_sampling_options()
    text = _read_standard_input() if prompt == "-" else prompt
    session = open_bundle(bundle, provider=provider, threads=threads, verify=not no_verify)
    loaded = None if cache is None else _load_cache(session, cache)
    if save_cache is not None:
        message = _prefill_and_save(session, text, loaded or session.new_cache(), save_cache)
        if not quiet:
            click.echo(message, err=True)
        return
    stream = session.stream(
        text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop or None,
        cache=loaded,
    )
    for piece in chain([text + next(stream, "")], stream):  # prints no prompt if the session rejects it
        click.echo(piece, nl=False)  # and flushes
    click.echo()
    if not quiet:
        click.echo(_summary(stream, session, loaded, stop), err=True)


def _reject_sampling_options() -> None:
    """
    Raises:
        UsageError: an option for sampling was given together with --save-cache.
    """
    context = click.get_current_context()
    for name in ("temperature", "top_k", "top_p", "seed", "stop"):
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            option = "--" + name.replace("_", "-")
            raise UsageError(
                f"--save-cache must be given without {option}: it generates nothing",
                got=option,
                fix=f"leave {option} out, and give it in the run with --cache",
            )


def _load_cache(session: Session, path: Path) -> Cache:
    """Load a saved cache of one sequence.

    Raises:
        UsageError: the cache has several sequences.
    """
    cache = session.load(path)
    if cache.batch != 1:
        raise UsageError(
            f"the cache {path} must contain one sequence",
            got=f"{cache.batch} sequences",
            expected=1,
            fix="load it in Python: session.load(path)",
        )
    return cache


def _prefill_and_save(session: Session, text: str, cache: Cache, path: Path) -> str:
    """Prefill a text, save the cache, and return a message about the file."""
    from kvexport.cli.report import size

    before = int(cache.lengths[0])
    session.prefill(text, cache=cache)
    cache.save(path)
    tokens = int(cache.lengths[0])
    content = f"{tokens} tokens" + (f", {before} of them from --cache" if before else "")
    return f"kvexport: wrote {path}: {content}, {size(path.stat().st_size)}"


def _read_standard_input() -> str:
    """All of standard input, without the line break at its end."""
    if sys.stdin is None:  # the parent process closed it
        raise UsageError("standard input is closed", fix="give the prompt with --prompt TEXT")
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            "standard input must be UTF-8 text",
            got=f"byte {error.object[error.start]:#04x} at offset {error.start}",
        ) from error
    return text.removesuffix("\n").removesuffix("\r")


def _summary(stream: Stream, session: Session, cache: Cache | None, stop: tuple[str, ...]) -> str:
    """Why a finished stream ended, its speed, and the size of its cache."""
    from kvexport.cli.report import size

    assert stream.generation is not None
    reason = {
        "stop": "the end-of-sequence token" + (" or a --stop text" if stop else ""),
        "length": "--max-new-tokens",
        "capacity": "the bundle's capacity",
    }[stream.generation.finish_reason]
    prefill = _speed(stream.timing.prefill_tokens, stream.timing.prefill_seconds)
    decode = _speed(stream.timing.decode_tokens, stream.timing.decode_seconds)
    (length,) = session.lengths if cache is None else cache.lengths
    in_use, allocated = session.bundle.kv_bytes(int(length)), session.memory(cache).bytes_allocated
    return (
        f"kvexport: stopped at {reason}; prefill {prefill}, decode {decode} on "
        f"{_PROVIDERS[session.provider]}; KV cache {size(in_use)} in use, {size(allocated)} allocated"
    )


def _speed(tokens: int, seconds: float) -> str:
    return f"{tokens} tokens" + (f" at {tokens / seconds:.0f}/s" if tokens and seconds else "")
