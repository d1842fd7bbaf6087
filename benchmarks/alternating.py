"""Parts of the benchmarks that compare sides by alternating calls in one process."""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from records import RESULTS

_UNCOUNTED, _COUNTED = 2, 4  # steps of a round
_PAUSE = 0.1  # seconds before a side's turn

Prefill = Callable[[list[int]], int]  # tokens to the likeliest next one
Step = Callable[[], int]  # one more token, the likeliest one


def parser_for(description: str | None, steps: int, repetitions: int) -> argparse.ArgumentParser:
    """The options of these benchmarks.

    Args:
        steps, repetitions: their defaults.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of every side [default: 2]")
    for name, default, what in (
        ("--steps", steps, "counted steps at each depth"),
        ("--repetitions", repetitions, "repetitions of each prefill"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{what} [default: {default}]")
    parser.add_argument("--work", type=Path, help="folder that keeps the models for the next run")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser


def room_for(steps: int) -> int:
    """Tokens that a side appends at one depth, with the uncounted ones."""
    return _UNCOUNTED + _COUNTED + -(-steps // _COUNTED) * (_UNCOUNTED + _COUNTED)


def alternate(
    sides: dict[str, tuple[Prefill, Step]],
    ids: list[int],
    prompts: Sequence[int],
    depths: Sequence[int],
    steps: int,
    repetitions: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Times of the prefills of each length and of the steps at each depth, sides alternating.

    Args:
        ids: tokens, as many as the longest prompt.
        clock: seconds.
    """
    record: dict[str, Any] = {"prefill": {}, "decode": {}}
    for prompt in prompts:
        times: dict[str, list[float]] = {side: [] for side in sides}
        for repetition in range(1 + repetitions):
            for side, (prefill, _) in sides.items():
                time.sleep(_PAUSE)
                begin = clock()
                prefill(ids[:prompt])
                if repetition or prompt > min(prompts):  # the very first calls pack weights
                    times[side].append(clock() - begin)
        record["prefill"][str(prompt)] = {side: summary(each) for side, each in times.items()}
        print(f"prefill {prompt}: " + shown(record["prefill"][str(prompt)]), file=sys.stderr)
    for depth in depths:
        for prefill, _ in sides.values():
            prefill(ids[:depth])
        gc.collect()
        times = {side: [] for side in sides}
        for _ in range(-(-steps // _COUNTED)):
            for side, (_, step) in sides.items():
                time.sleep(_PAUSE)
                for number in range(_UNCOUNTED + _COUNTED):
                    begin = clock()
                    step()
                    if number >= _UNCOUNTED:
                        times[side].append(clock() - begin)
        record["decode"][str(depth)] = {side: summary(each) for side, each in times.items()}
        print(f"decode {depth}: " + shown(record["decode"][str(depth)]), file=sys.stderr)
    return record


def version(package: str) -> str:
    from importlib.metadata import version as of

    return of(package)


def summary(seconds: list[float]) -> dict[str, Any]:
    raw = [round(1000 * each, 3) for each in seconds]
    low, median, high = statistics.quantiles(raw, n=4)
    return {"median_ms": round(median, 3), "quartiles_ms": [round(low, 3), round(high, 3)], "raw_ms": raw}


def shown(figures: dict[str, Any]) -> str:
    return ", ".join(f"{side} {each['median_ms']:.1f} ms" for side, each in figures.items())


def target(
    record: dict[str, Any], stage: str, tokens: int, who: str, whom: str, least: float
) -> dict[str, Any]:
    """How many times as fast `who` is, call by call."""
    figures = record[stage][str(tokens)]
    pairs = zip(figures[who]["raw_ms"], figures[whom]["raw_ms"], strict=True)
    low, median, high = statistics.quantiles([theirs / ours for ours, theirs in pairs], n=4)
    return {
        "stage": stage,
        "tokens": tokens,
        "who": who,
        "whom": whom,
        "at_least": least,
        "times_as_fast": round(median, 3),
        "quartiles": [round(low, 3), round(high, 3)],
        "reached": median >= least,
    }


def figures_table(record: dict[str, Any], sides: Sequence[str]) -> str:
    """Medians and quartiles of each side, and the targets, as Markdown."""
    columns = [(stage, tokens) for stage in ("prefill", "decode") for tokens in record[stage]]
    text = (
        "| |"
        + "".join(f" {stage} {'of' if stage == 'prefill' else 'at'} {tokens} |" for stage, tokens in columns)
        + "\n"
    )
    text += "|---" * (1 + len(columns)) + "|\n"
    for side in sides:
        cells = []
        for stage, tokens in columns:
            figures = record[stage][tokens][side]
            low, high = figures["quartiles_ms"]
            cells.append(f" {figures['median_ms']:,.1f} ({low:,.1f}–{high:,.1f}) |")
        text += f"| {side} |" + "".join(cells) + "\n"
    text += (
        "\n| | is so many times as fast as | aimed at | median of the ratios (quartiles) | "
        "|\n|---|---|---|---|---|\n"
    )
    for each in record["targets"]:
        low, high = each["quartiles"]
        text += (
            f"| {each['who']}, {each['stage']} {each['tokens']} | {each['whom']} | {each['at_least']} "
            f"| {each['times_as_fast']:.2f} ({low:.2f}–{high:.2f}) | "
            f"{'reached' if each['reached'] else 'missed'} |\n"
        )
    return text
