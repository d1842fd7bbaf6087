"""`kvexport bench`."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvexport.cli.options import progress_bar, provider_option, threads_option
from kvexport.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from kvexport.bench import Result
    from kvexport.cli.report import PlainConsole
    from kvexport.runtime import Session


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--compare",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="Second bundle to measure in alternation with the first, for a comparison.",
)
@click.option(
    "-d",
    "--depth",
    metavar="N,...",
    help="Context lengths in tokens at which decode starts, separated by commas.  [default: 0,512,4096, as "
    "far as they fit]",
)
@click.option(
    "-p",
    "--prompt-tokens",
    type=click.IntRange(min=1),
    help="Prompt length of a prefill in tokens.  [default: 512, or the capacity if that is less]",
)
@click.option(
    "-n",
    "--new-tokens",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    help="Number of tokens to decode at each depth.",
)
@click.option(
    "--repetitions",
    type=click.IntRange(min=2),
    default=5,
    show_default=True,
    help="Number of measured prefills.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Random seed of the tokens in prompt and cache.",
)
@provider_option
@threads_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to append the results to, as JSON lines. `kvexport plan BUNDLE` compares the results in "
    "BUNDLE/bench/*.json with its predictions.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON lines.")
@click.option("--quiet", is_flag=True, help="Print no progress.")
def command(
    bundle: Path,
    compare: Path | None,
    depth: str | None,
    prompt_tokens: int | None,
    new_tokens: int,
    repetitions: int,
    seed: int,
    provider: str,
    threads: int | None,
    output: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure BUNDLE's prefill speed, decode speed and memory use on this machine.

    Prompt and cache contain random tokens. If the bundle has a KV budget, there may be more tokens than the
    budget, up to the capacity. The first prefill and the first three steps at each depth are not counted. A
    step takes one token and returns its logits; the time to choose the next token is not included.
    """
    from kvexport.bench import BenchOptions, describe, measure, readings
    from kvexport.devices.telemetry import peak_host_bytes
    from kvexport.runtime import open_bundle

    depths = None if depth is None else _parse_depths(depth)
    if output is not None and not output.parent.is_dir():
        raise UsageError(
            "the folder of --output must exist", got=output.parent, fix=f"mkdir -p {output.parent}"
        )
    if output is not None and output.is_dir():
        raise UsageError("--output must be a file, not a folder", got=output, fix="name a file in it")
    paths = [bundle] if compare is None else [bundle, compare]
    sessions = [open_bundle(path, provider=provider, threads=threads) for path in paths]
    options = BenchOptions.fitting(sessions, prompt_tokens, depths, new_tokens, repetitions, seed)
    options.check(sessions)
    started, before = datetime.now(timezone.utc).isoformat(timespec="seconds"), readings()
    with progress_bar(quiet) as progress:
        results = measure(sessions, options, progress)
    conditions = {
        "started": started,
        "machine": describe(),
        "before": before,
        "after": readings(),
        "threads": threads,
        "settings": options.to_json(),
        "turns_with": None if compare is None else [path.name for path in paths],
        "peak_host_bytes": peak_host_bytes(),  # of the process, that is of both bundles with --compare
    }
    lines = [
        json.dumps(_to_json(session, result) | conditions)
        for session, result in zip(sessions, results, strict=True)
    ]
    if as_json:
        click.echo("\n".join(lines))
    else:
        _print(sessions, results, conditions)
    if output is not None:  # after the results are printed: writing can fail
        with output.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)


def _parse_depths(text: str) -> tuple[int, ...]:
    try:
        depths = tuple(int(each) for each in text.split(","))
    except ValueError:
        depths = ()
    if not depths or min(depths) < 0:
        raise UsageError(
            "-d must be a list of context lengths",
            got=text,
            expected="integers >= 0, separated by commas, such as 0,512",
        )
    return depths


def _to_json(session: Session, result: Result) -> dict[str, Any]:
    from kvexport.version import __version__

    bundle = session.bundle
    return {
        "kvexport": __version__,
        "bundle": bundle.path.name,
        "manifest_sha256": bundle.digest,
        "dtype": bundle.dtype,
        "weights": bundle.weights.summary,
        "engine": session.engine,
        **result.to_json(),
    }


def _print(sessions: Sequence[Session], results: Sequence[Result], conditions: dict[str, Any]) -> None:
    from kvexport.bench import ratios
    from kvexport.cli.report import PlainConsole, size

    names = [session.bundle.path.name for session in sessions]
    if len(set(names)) < len(names):
        names = [str(session.bundle.path) for session in sessions]
    out = PlainConsole()
    out.print(_table(names, results))
    skipped = conditions["settings"]["uncounted"]
    out.print_line(
        f"random tokens; warm-up of {skipped['prefill']} prefill and {skipped['decode']} steps at each depth"
    )
    for name, session, result in zip(names, sessions, results, strict=True):
        in_use, allocated = size(result.kv_bytes_planned), size(result.kv_bytes_allocated)
        out.print_line(
            f"{name}: {session.engine}; KV cache {in_use} in use at the largest depth, {allocated} allocated"
        )
        if (eviction := session.bundle.eviction) is not None:
            out.print_line(f"{name}: KV budget {eviction}")
        if result.device is not None and result.peak_device_bytes is not None:
            peak = size(result.peak_device_bytes)
            out.print_line(f"{name}: peak memory of {result.device['name']} {peak}, all processes together")
    if len(results) == 2:
        first, second = names
        for ratio in ratios(*results):
            low, high = ratio["quartiles"]
            out.print_line(
                f"{ratio['stage']} at {ratio['depth']}: {second} takes {ratio['median']:.2f} times as long "
                f"as {first} (quartiles {low:.2f} to {high:.2f})"
            )
    _print_machine(conditions, out)


def _table(names: Sequence[str], results: Sequence[Result]) -> Table:
    from kvexport.cli.report import plain_table

    table = plain_table("bundle", "stage", "tokens in cache", "p50 ms", "p90 ms", "p99 ms", "tokens/s")
    for name, result in zip(names, results, strict=True):
        for stage in ("prefill", "decode"):
            for point in getattr(result, stage):
                percentiles = (f"{each:,.2f}" for each in (point.p50_ms, point.p90_ms, point.p99_ms))
                tokens = f"0 to {point.tokens}" if stage == "prefill" else str(point.depth)
                table.add_row(name, stage, tokens, *percentiles, f"{point.tokens_per_second:,.1f}")
    return table


def _print_machine(conditions: dict[str, Any], out: PlainConsole) -> None:
    from kvexport.cli.report import size

    peak, mode = conditions["peak_host_bytes"], conditions["machine"]["power_mode"]
    after = conditions["after"]
    facts = [
        f"peak host memory {size(peak)}" if peak else None,
        f"power mode {mode}" if mode else None,
        _list_readings("°C", after["temperature_c"]),
        _list_readings("MHz", after["clock_mhz"]),
    ]
    out.print_line("; ".join(fact for fact in facts if fact))
    for gpu in after["gpus"]:
        values = (f"{key} {value}" for key, value in gpu.items() if key != "name" and value is not None)
        out.print_line(", ".join([str(gpu["name"]), *values]))


def _list_readings(unit: str, readings: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:,.0f} {unit}" for name, value in readings.items())
