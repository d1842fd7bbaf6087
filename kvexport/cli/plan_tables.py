"""Targets and plans as tables for people; knows how figures are shown, and nothing of how they are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvexport.cli.report import PlainConsole, facts_table, plain_table, size

if TYPE_CHECKING:
    from kvexport.devices.targets import Target
    from kvexport.eviction.config import Eviction
    from kvexport.plan import Comparison, Plan, Range

_PLAN_WIDTH = 140  # where there is no terminal to ask


def print_targets(targets: Sequence[Target]) -> None:
    """One line a target."""
    table = plain_table("target", "memory", "usable", "GB/s", "SM", "FP16 TFLOPS", "engine", "version")
    for target in targets:
        table.add_row(
            target.name,
            size(target.memory),
            f"{target.usable:.0%}",
            f"{target.bandwidth / 1e9:g}",
            target.sm or "-",
            _tera(target.fp16),
            target.engine,
            target.tensorrt or "-",
        )
    out = PlainConsole()
    out.print(table)
    out.say("(`kvexport targets NAME` says where each figure is from)")


def print_target(target: Target) -> None:
    """One target with its sources."""
    figures = {
        "memory_gib": ("memory", size(target.memory)),
        "usable": ("usable", f"{target.usable:.0%}, {size(target.usable_bytes)}"),
        "bandwidth_gb_s": (
            "bandwidth",
            f"{target.bandwidth / 1e9:g} GB/s{', shared with the CPU' * target.unified}",
        ),
        "fp16_tflops": ("FP16, dense", f"{_tera(target.fp16)} TFLOPS"),
        "int8_tops": ("INT8, dense", f"{_tera(target.int8)} TOPS"),
        "sm": ("compute capability", target.sm or "-"),
        "tensorrt": (target.engine, target.tensorrt or "-"),
        "jetpacks": (
            "JetPack",
            ", ".join(f"{jetpack} has {version}" for jetpack, version in target.jetpacks.items()),
        ),
    }
    out = PlainConsole()
    out.say(f"{target.title} ({target.name}), engine {target.engine}")
    table = facts_table()
    table.add_column(overflow="fold")
    for key, (what, shown) in figures.items():
        if key in target.sources:
            table.add_row(what, shown, target.sources[key])
    out.print(table)


def print_plan(plan: Plan) -> None:
    """A row for each precision, number of KV heads and context, and what the figures mean."""
    table = plain_table(
        "dtype",
        "KV heads",
        "context",
        "weights",
        "KV",
        "other",
        "total",
        "fits",
        "longest",
        "prefill",
        "decode",
    )
    for row in plan.rows:
        table.add_row(
            row.dtype,
            str(row.kv_heads),
            str(row.memory.context),
            size(row.memory.weights),
            size(row.memory.kv),
            size(row.memory.activations + row.memory.engine),
            size(row.memory.total),
            "-"
            if row.short_bytes is None
            else f"lacks {size(row.short_bytes)}"
            if row.short_bytes
            else "yes",
            "-" if row.largest_context is None else str(row.largest_context),
            _prefill(row.prefill_seconds),
            _decode(row.decode_seconds),
        )
    out = PlainConsole()
    if not out.is_terminal:
        out.width = _PLAN_WIDTH
    out.print(table)
    out.print()
    _print_notes(plan, out)
    if plan.comparisons:
        _print_comparisons(plan.comparisons, out)


def _print_notes(plan: Plan, out: PlainConsole) -> None:
    if plan.target is None:
        out.say(
            "Sizes alone; --target NAME says what fits and how fast it is predicted to be (`kvexport targets` lists them)."
        )
    else:
        target = plan.target
        share = f"{target.usable:.0%} of {size(target.memory)}"
        out.say(
            f"{target.title}: an application can have {size(target.usable_bytes)} ({share}), lowering {plan.lowering}."
        )
        out.say("Times are an estimate for batch 1: typical, and the band that published figures give.")
        out.say("prefill: a prompt as long as the context; decode: tokens per second after as many tokens.")
        if not target.jetpacks:
            out.say(
                "Those figures are of Jetson Orin and Thor: for this target the times are an extrapolation."
            )
        out.say(
            "longest: the most tokens that fit, no more than the model was trained for. other: activations and engine."
        )
        if any(row.prefill_seconds is None for row in plan.rows):
            out.say(
                f"No prefill time where the target's file has no arithmetic rate for the precision ({target.name})."
            )
    if plan.eviction is not None:
        out.say(_budget(plan.eviction, max(row.memory.kv_state for row in plan.rows)))
    if plan.maps:
        out.say(
            "Fewer KV heads: weights with the key and query maps of the online method; the folding one has none."
        )
    if any(row.dtype.startswith("int") for row in plan.rows):
        out.say(
            "int8 and int4 (weights of the layers alone) are for planning: kvexport writes float32, float16 and bfloat16."
        )


def _budget(eviction: Eviction, state: int) -> str:
    skipped = eviction.skip_layers
    whole = "" if not skipped else f"layer{'s' * (len(skipped) > 1)} {', '.join(map(str, skipped))}"
    whole = whole and f"; {whole} hold{'s' * (len(skipped) == 1)} the whole context"
    return (
        f"KV: a budget of {eviction.budget} tokens in each KV head, each with 8 bytes of score and position "
        f"(of the KV above {size(state)} at most){whole}."
    )


def _print_comparisons(comparisons: Sequence[Comparison], out: PlainConsole) -> None:
    table = plain_table("measured in", "what", "predicted", "measured", "ratio")
    for each in comparisons:
        shown = (
            size(value) if each.unit == "bytes" else f"{value:.2f} ms"
            for value in (each.predicted, each.measured)
        )
        table.add_row(each.source, each.what, *shown, f"{each.ratio:.2f}")
    out.print()
    out.print(table)


def _prefill(seconds: Range | None) -> str:
    if seconds is None:
        return "-"
    return f"{_figure(seconds.typical)} s ({_figure(seconds.low)}–{_figure(seconds.high)})"


def _decode(seconds: Range | None) -> str:
    if seconds is None:
        return "-"
    return f"{_figure(1 / seconds.typical)}/s ({_figure(1 / seconds.high)}–{_figure(1 / seconds.low)})"


def _figure(value: float) -> str:
    """Two digits that count, or all that are before the point."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _tera(rate: float | None) -> str:
    return "-" if rate is None else f"{rate / 1e12:g}"
