"""`kvexport bench`: prefill and decode apart, at several depths, as a table and as one JSON line a run."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvexport.cli.options import progress_bar, provider_option
from kvexport.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvexport.bench import Result
    from kvexport.cli.report import PlainConsole
    from kvexport.runtime import Session


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--compare",
    type=click.Path(path_type=Path),
    metavar="OTHER",
    help="Another bundle, which takes turns with it.",
)
@click.option(
    "-d",
    "--depth",
    metavar="N,...",
    help="Tokens of the text when decoding begins [default: 0,512,4096 where they fit].",
)
@click.option(
    "-p", "--prompt-tokens", type=click.IntRange(min=1), help="Of a prefill [default: 512 where they fit]."
)
@click.option(
    "-n",
    "--new-tokens",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    help="Decoded at each depth.",
)
@click.option(
    "--repetitions", type=click.IntRange(min=2), default=5, show_default=True, help="Of the prefill."
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of the random tokens that fill prompt and cache.",
)
@provider_option
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="Of one operator on the CPU [default: one a core]."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Append the JSON lines to a file; `kvexport plan BUNDLE` compares those in BUNDLE/bench/*.json with its prediction.",
)
@click.option("--json", "as_json", is_flag=True, help="JSON lines in place of the table.")
@click.option("--quiet", is_flag=True, help="No progress.")
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
    """Measure how fast BUNDLE reads a prompt and makes tokens here, and what memory it takes.

    Random tokens fill prompt and cache; of a bundle with a budget they may be more than that, up to its capacity. The first
    prefill, and the first three steps at each depth, do not count. A step is one token in and its logits out; choosing the
    next token is not timed.
    """
    from kvexport.bench import Plan, describe, measure, readings
    from kvexport.cli.report import PlainConsole
    from kvexport.devices.telemetry import peak_host_bytes
    from kvexport.runtime import open_bundle

    depths = None if depth is None else _depths(depth)
    if output is not None and not output.parent.is_dir():
        raise UsageError(
            "the folder of --output is not there", got=output.parent, fix=f"mkdir -p {output.parent}"
        )
    paths = [bundle] if compare is None else [bundle, compare]
    sessions = [open_bundle(path, provider=provider, threads=threads) for path in paths]
    plan = Plan.fitting(sessions, prompt_tokens, depths, new_tokens, repetitions, seed)
    plan.check(sessions)
    started, before = datetime.now(timezone.utc).isoformat(timespec="seconds"), readings()
    with progress_bar(quiet) as progress:
        results = measure(sessions, plan, progress)
    shared = {
        "started": started,
        "machine": describe(),
        "before": before,
        "after": readings(),
        "threads": threads,
        "settings": plan.to_json(),
        "turns_with": None if compare is None else [path.name for path in paths],
        "peak_host_bytes": peak_host_bytes(),  # of the process: of both bundles, where two take turns
    }
    lines = [
        json.dumps(_line(session, result) | shared) for session, result in zip(sessions, results, strict=True)
    ]
    if as_json:
        click.echo("\n".join(lines))
    else:
        _print(sessions, results, shared, PlainConsole())
    if output is not None:  # last: should it fail, the figures have been shown
        with output.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)


def _depths(text: str) -> tuple[int, ...]:
    try:
        depths = tuple(int(each) for each in text.split(","))
    except ValueError:
        depths = ()
    if not depths or min(depths) < 0:
        raise UsageError(
            "-d takes depths", got=text, expected="whole numbers from 0 up, with commas between them"
        )
    return depths


def _line(session: Session, result: Result) -> dict[str, Any]:
    from kvexport.version import __version__

    bundle = session.bundle
    return {
        "kvexport": __version__,
        "bundle": bundle.path.name,
        "manifest_sha256": bundle.digest,
        "dtype": bundle.dtype,
        "engine": session.engine,
        **result.to_json(),
    }


def _print(
    sessions: Sequence[Session], results: Sequence[Result], shared: dict[str, Any], out: PlainConsole
) -> None:
    from kvexport.bench import ratios
    from kvexport.cli.report import plain_table, size

    names = [session.bundle.path.name for session in sessions]
    if len(set(names)) < len(names):
        names = [str(session.bundle.path) for session in sessions]
    table = plain_table("bundle", "", "depth", "p50 ms", "p90 ms", "p99 ms", "tokens/s")
    for name, result in zip(names, results, strict=True):
        for stage in ("prefill", "decode"):
            for point in getattr(result, stage):
                figures = (f"{each:,.2f}" for each in (point.p50_ms, point.p90_ms, point.p99_ms))
                into = f"0 to {point.tokens}" if stage == "prefill" else str(point.depth)
                table.add_row(name, stage, into, *figures, f"{point.tokens_per_second:,.1f}")
    out.print(table)
    uncounted = shared["settings"]["uncounted"]
    out.say(
        f"random tokens; not counted: the first {uncounted['prefill']} prefill, and {uncounted['decode']} steps at each depth"
    )
    for name, session, result in zip(names, sessions, results, strict=True):
        out.say(
            f"{name}: {session.engine}; KV cache {size(result.kv_bytes_planned)} in use at the deepest, "
            f"{size(result.kv_bytes_allocated)} allocated"
        )
        if (eviction := session.bundle.eviction) is not None:
            out.say(f"{name}: holds {eviction}")
        if result.device is not None and result.peak_device_bytes is not None:
            device, in_use = result.device["name"], size(result.peak_device_bytes)
            out.say(
                f"{name}: at most {in_use} of the memory of {device} in use, by this process and all others"
            )
    if len(results) == 2:
        one, other = names
        for ratio in ratios(*results):
            low, high = ratio["quartiles"]
            at = f"{ratio['stage']} at {ratio['depth']}"
            out.say(
                f"{at}: {other} takes {ratio['median']:.2f} times as long as {one} (quartiles {low:.2f} to {high:.2f})"
            )
    peak = shared["peak_host_bytes"]
    after = shared["after"]
    told = [
        f"peak memory {size(peak)}" if peak else None,
        f"power mode {mode}" if (mode := shared["machine"]["power_mode"]) else None,
        _listed("°C", after["temperature_c"]),
        _listed("MHz", after["clock_mhz"]),
    ]
    out.say("; ".join(each for each in told if each))
    for gpu in after["gpus"]:
        shown = [
            str(gpu["name"]),
            *(f"{what} {each}" for what, each in gpu.items() if what != "name" and each is not None),
        ]
        out.say(", ".join(shown))


def _listed(unit: str, readings: dict[str, float]) -> str:
    return ", ".join(f"{name} {each:,.0f} {unit}" for name, each in readings.items())
