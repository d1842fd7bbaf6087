"""Tables of `kvexport plan` and `kvexport targets`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvexport.cli.report import PlainConsole, facts_table, plain_table, size

if TYPE_CHECKING:
    from rich.table import Table

    from kvexport.devices.targets import Target
    from kvexport.eviction.config import Eviction
    from kvexport.plan import Comparison, Plan, Range, Row

_PLAN_WIDTH = 150  # without a terminal


def print_targets(targets: Sequence[Target]) -> None:
    """Print one row for each target."""
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
    out.print_line("(`kvexport targets NAME` shows the source of each value)")


def print_target(target: Target) -> None:
    """Print one target with the source of each value."""
    values = {
        "memory_gib": ("memory", size(target.memory)),
        "usable": ("usable memory", f"{target.usable:.0%}, {size(target.usable_bytes)}"),
        "bandwidth_gb_s": (
            "memory bandwidth",
            f"{target.bandwidth / 1e9:g} GB/s{', shared with the CPU' * target.unified}",
        ),
        "fp16_tflops": ("FP16, dense", f"{_tera(target.fp16)} TFLOPS"),
        "int8_tops": ("INT8, dense", f"{_tera(target.int8)} TOPS"),
        "sm": ("compute capability", target.sm or "-"),
        "tensorrt": (target.engine, target.tensorrt or "-"),
        "jetpacks": (
            "TensorRT by JetPack",
            ", ".join(f"{jetpack}: {version}" for jetpack, version in target.jetpacks.items()),
        ),
    }
    out = PlainConsole()
    out.print_line(f"{target.title} ({target.name}), engine {target.engine}")
    table = facts_table()
    table.add_column(overflow="fold")
    for key, (name, value) in values.items():
        if key in target.sources:
            table.add_row(name, value, target.sources[key])
    out.print(table)


def print_plan(plan: Plan) -> None:
    """Print the bytes of the weights, then one row for each format of weights, number of KV heads and context
    length, and notes on the columns."""
    out = PlainConsole()
    if not out.is_terminal:
        out.width = _PLAN_WIDTH
    out.print(_weights_table(plan.rows))
    out.print()
    table = plain_table(
        "weights",
        "KV heads",
        "context",
        "weights",
        "KV cache",
        "activations",
        "other",
        "total",
        "fits",
        "max context",
        "prefill",
        "decode",
    )
    for row in plan.rows:
        table.add_row(
            row.formats.layers,
            str(row.kv_heads),
            str(row.memory.context),
            size(row.memory.weights),
            size(row.memory.kv),
            size(row.memory.activations),
            size(row.memory.io + row.memory.engine),
            size(row.memory.total),
            _fits(row.short_bytes),
            "-" if row.largest_context is None else str(row.largest_context),
            _prefill(row.prefill_seconds),
            _decode(row.decode_seconds),
        )
    out.print(table)
    out.print()
    _print_notes(plan, out)
    if plan.comparisons:
        _print_comparisons(plan.comparisons, out)


def _weights_table(rows: Sequence[Row]) -> Table:
    """One row for each format of weights and number of KV heads."""
    table = plain_table(
        "weights",
        "KV heads",
        "layers",
        "embedding",
        "head",
        "for 8 bits",
        "norms, maps, RoPE",
        "total",
        "of it scales",
    )
    for weights in dict.fromkeys((row.formats.summary, row.kv_heads, row.weights) for row in rows):
        formats, kv_heads, parts = weights
        sizes = (
            *(parts.layers, parts.embedding, parts.head),
            *(parts.eight_bits, parts.other, parts.total, parts.scales),
        )
        table.add_row(formats, str(kv_heads), *("-" if each == 0 else size(each) for each in sizes))
    return table


def _print_notes(plan: Plan, out: PlainConsole) -> None:
    out.print_line(
        f"{plan.rows[0].dtype} computes and is cached; lowering {plan.lowering}. Every figure is calculated."
    )
    if plan.target is None:
        out.print_line(
            "Sizes only. --target NAME adds what fits and the predicted speed (`kvexport targets` lists the "
            "names)."
        )
    else:
        target = plan.target
        fraction = f"{target.usable:.0%} of {size(target.memory)}"
        out.print_line(f"{target.title}: {size(target.usable_bytes)} usable by an application ({fraction}).")
        out.print_line(
            "Times are estimates for batch 1, with the range of published measurements in parentheses."
        )
        out.print_line(
            "prefill: time of a prompt as long as the context. decode: tokens per second after that many "
            "tokens."
        )
        if not target.jetpacks:
            out.print_line(
                "The published measurements are of Jetson Orin and Thor: times for this target are an "
                "extrapolation."
            )
        out.print_line(
            "max context: the most tokens that fit, up to the model's maximum. other: logits, and an assumed "
            f"{size(plan.rows[0].memory.engine)} of CUDA context and libraries."
        )
        if any(row.prefill_seconds is None for row in plan.rows):
            out.print_line(
                "No prefill time where the target file has no arithmetic rate for the data type "
                f"({target.name})."
            )
    if plan.eviction is not None:
        out.print_line(_eviction_note(plan.eviction, max(row.memory.kv_state for row in plan.rows)))
    if any(row.weights.eight_bits for row in plan.rows):
        out.print_line(
            "for 8 bits: what int4 weights take more because the most sensitive get 8 bits (--weight-bits)."
        )
    if plan.maps:
        out.print_line(
            "With fewer KV heads, weights include the key and query maps of the method online; fold has none."
        )


def _eviction_note(eviction: Eviction, state_bytes: int) -> str:
    note = (
        f"KV cache: a budget of {eviction.budget} tokens in each KV head, each with 8 bytes of score and "
        f"position (at most {size(state_bytes)} of the KV cache)"
    )
    layers = ", ".join(map(str, eviction.skip_layers))
    if len(eviction.skip_layers) == 1:
        note += f"; layer {layers} does not evict"
    elif eviction.skip_layers:
        note += f"; layers {layers} do not evict"
    return f"{note}."


def _print_comparisons(comparisons: Sequence[Comparison], out: PlainConsole) -> None:
    table = plain_table("measured in", "quantity", "predicted", "measured", "measured / predicted")
    for each in comparisons:
        values = (
            size(value) if each.unit == "bytes" else f"{value:.2f} ms"
            for value in (each.predicted, each.measured)
        )
        table.add_row(each.source, each.what, *values, f"{each.ratio:.2f}")
    out.print()
    out.print(table)


def _fits(missing_bytes: int | None) -> str:
    if missing_bytes is None:
        return "-"
    return f"{size(missing_bytes)} short" if missing_bytes else "yes"


def _prefill(seconds: Range | None) -> str:
    if seconds is None:
        return "-"
    return f"{_two_digits(seconds.typical)} s ({_two_digits(seconds.low)}–{_two_digits(seconds.high)})"


def _decode(seconds: Range | None) -> str:
    if seconds is None:
        return "-"
    typical, low, high = (1 / value for value in (seconds.typical, seconds.high, seconds.low))
    return f"{_two_digits(typical)}/s ({_two_digits(low)}–{_two_digits(high)})"


def _two_digits(value: float) -> str:
    """Two significant digits, or all digits before the decimal point."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _tera(rate: float | None) -> str:
    return "-" if rate is None else f"{rate / 1e12:g}"
