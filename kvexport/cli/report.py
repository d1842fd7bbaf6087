"""Tables of `build`, `compress`, `analyze`, `inspect`, `validate` and `evaluate`; parts of all tables."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvexport.build import BuildReport
    from kvexport.build.read_back import ReadBack
    from kvexport.build.report import WeightBits
    from kvexport.bundle import Bundle
    from kvexport.bundle.layer_report import LayerReport
    from kvexport.heal.report import HealReport
    from kvexport.model.divergence import Divergence
    from kvexport.validate import ValidationReport
    from kvexport.validate.evaluate import Evaluation

_WIDTH = 100  # without a terminal
# Names of the stages, by their keys in the report of a build.
_STAGES = {
    "read": "reading the checkpoint",
    "text": "calibration text",
    "analysis": "sensitivity analysis",
    "trials": "trials for --max-kl",
    "weight-analysis": "weight analysis",
    "convert": "conversion",
    "heal": "healing",
    "self-test": "self-test",
    "write": "writing",
    "validation": "validation",
    "read-back": "reading back",
}


class PlainConsole(Console):
    """Prints text unchanged: no markup, no emoji names, no colours of its own."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)
        if not self.is_terminal:
            self.width = _WIDTH

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit with 1, which is the code of a failed gate

    def print_line(self, text: str) -> None:
        """Print one line and leave wrapping to the terminal, so that paths can be copied."""
        self.print(text, soft_wrap=True)


def plain_table(*columns: str) -> Table:
    """A table without borders, whose first column is left-aligned; cells wrap in a narrow terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def facts_table() -> Table:
    """A table of two columns: names and values."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def size(count: float) -> str:
    """Format a number of bytes: 512 B, 1.5 KiB, ..."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def layer_table(layers: Iterable[LayerReport]) -> Table:
    """One row for each layer: heads, widths, method, errors."""
    table = plain_table(
        "layer", "KV heads", "head dim", "method", "predicted error", "measured error", "residual error"
    )
    for index, layer in enumerate(layers):
        widths = dict.fromkeys((layer.key_head_dim, layer.value_head_dim))  # one if they are equal
        table.add_row(
            str(index),
            f"{layer.original_num_key_value_heads} → {layer.num_key_value_heads}",
            f"{layer.original_head_dim} → {'/'.join(map(str, widths))}",
            layer.method,
            f"{layer.predicted_error:.4f}",
            f"{layer.measured_error:.4f}",
            f"{layer.residual_error:.4f}",
        )
    return table


def print_bundle(bundle: Bundle, verified: bool) -> None:
    """Print the layers of a bundle, its sizes and its files."""
    out = PlainConsole()
    out.print(layer_table(bundle.layers))
    table = facts_table()
    source, calibration = bundle.source, bundle.calibration or {}
    table.add_row("source", f"{source.name} ({source.model_type}), sha256 {source.sha256[:12]}")
    if calibration:
        table.add_row("calibration", ", ".join(f"{key} {value}" for key, value in calibration.items()))
    table.add_row("built by", f"kvexport {bundle.version}")
    table.add_row("dtype", bundle.dtype)
    table.add_row("weights", bundle.weights.summary)
    table.add_row("capacity", f"{bundle.capacity} tokens")
    table.add_row("KV cache per token", size(bundle.kv_bytes_per_token))
    table.add_row("  original", size(bundle.kv_bytes_per_token_original))
    if bundle.eviction is not None:
        table.add_row("KV budget", str(bundle.eviction))
    for window, count in sorted(Counter(bundle.rings).items()):
        layers = "1 layer holds" if count == 1 else f"{count} layers hold"
        table.add_row(f"window of {window} tokens", f"{layers} the window and one call, without loss")
    table.add_row("KV cache at capacity", size(bundle.kv_bytes(bundle.capacity)))
    table.add_row("text", _text_support(bundle))
    for name, entry in bundle.files.items():
        table.add_row(name, f"{size(entry.bytes)}, sha256 {entry.sha256[:12]}{' ok' if verified else ''}")
    out.print()
    out.print(table)


def _text_support(bundle: Bundle) -> str:
    from kvexport.bundle import TOKENIZER_FILE
    from kvexport.bundle.text_file import read_text_file

    if TOKENIZER_FILE not in bundle.files:
        return "no tokenizer: token ids only"
    text_file = read_text_file(bundle)
    chat = None if text_file is None else text_file.chat
    if chat is None:
        return "tokenizer, no chat template"
    if chat.begin_system is None:
        return "tokenizer, chat template without a system prompt"
    return "tokenizer, chat template"


def print_build(report: BuildReport, output: Path, *, as_json: bool, quiet: bool) -> None:
    """Print the report of `build` or `compress`."""
    if as_json:
        click.echo(json.dumps(report.to_json()))
        return
    if quiet:
        return
    out = PlainConsole()
    out.print(layer_table(report.layers))
    out.print()
    if report.frontier:
        out.print(frontier_table(report))
        out.print()
    out.print(_summary_table(report, output.name))
    if report.divergence is not None:
        out.print_line(f"(on {report.divergence.tokens} held-out calibration tokens)")
    if report.calibration is not None:
        out.print_line(_calibration_line(report.calibration))
    if report.healing is not None:
        out.print_line(_healing_line(report.healing))
    if report.weights is not None and report.weight_bytes is not None:
        method = "" if report.weight_method is None else f", quantised by {report.weight_method}"
        out.print_line(f"weights: {report.weights.summary}{method}, {size(report.weight_bytes)}")
    if report.weight_bits is not None:
        out.print_line(_weight_bits_line(report.weight_bits))
    if report.quantization is not None:
        loss = report.quantization
        out.print_line(
            f"loss from integer weights alone: mean KL {loss.mean_kl:.5f} to the same model in float, "
            f"same top token {loss.top1_agreement:.1%} (on {loss.tokens} held-out calibration tokens); the "
            "loss from compression, in the table, is without it"
        )
    if report.eviction is not None:
        out.print_line(f"KV budget: {report.eviction}. The loss from eviction is not in the table")
    if report.validation is not None:
        out.print_line(f"\nvalidated against PyTorch: {_verdict(report.validation)}")
    if report.read_back is not None:
        out.print_line(f"\n{_read_back_line(report.read_back)}")
    out.print_line(_time_line(report))
    out.print_line(f"wrote {output}")


def _weight_bits_line(chosen: WeightBits) -> str:
    """The mean bits of a weight, and the weights that have 8 bits."""
    names = [each for each in chosen.eight_bits if each in ("head", "embedding")]
    maps = len(chosen.eight_bits) - len(names)
    if maps:
        names.append("1 linear map" if maps == 1 else f"{maps} linear maps")
    eight = " and ".join(names) if names else "no weights"
    return (
        f"{chosen.bits:.2f} bits a weight, scales included: {eight} in 8 bits, predicted mean KL "
        f"{chosen.predicted_kl:.5f}"
    )


def _calibration_line(record: dict[str, Any]) -> str:
    """Which text the model was calibrated on, and why, if another was requested."""
    text = {
        "mixed": "the shipped text" + (" and text sampled from the model" if "sampled" in record else ""),
        "self": "text sampled from the model",
        "random": "random tokens",
    }.get(record["source"], record.get("file", "a text"))
    line = f"calibrated on {text}, {record['samples']} windows of {record['length']} tokens"
    return f"{line}, because {record['reason']}" if "reason" in record else line


def _time_line(report: BuildReport) -> str:
    """The time of the build and its device, the time of its longest stage and of the others; and the stages
    that took none.
    """
    times = {key: f"{_STAGES[key]} {seconds:.1f} s" for key, seconds in report.seconds.items()}
    longest = times.pop(report.longest_stage)
    total = f"took {sum(report.seconds.values()):.1f} s on {report.device}"
    line = f"{total}; the longest stage was {longest}; {', '.join(times.values())}"
    if report.reused:
        line += f"; saved earlier: {', '.join(_STAGES[key] for key in report.reused)}"
    return line


def _summary_table(report: BuildReport, name: str) -> Table:
    table = plain_table("", "original", name)
    table.add_row(
        "KV cache per token", size(report.kv_bytes_per_token_original), size(report.kv_bytes_per_token)
    )
    original = report.kv_bytes_at_capacity_original
    if report.kv_bytes_at_capacity is not None and original is not None:
        table.add_row(
            f"KV cache at {report.capacity} tokens", size(original), size(report.kv_bytes_at_capacity)
        )
    table.add_row("parameters", f"{report.parameters_original:,}", f"{report.parameters:,}")
    if report.divergence is not None:
        _add_divergence(table, report.divergence)
    return table


def _healing_line(healing: HealReport) -> str:
    steps = "1 step" if healing.steps == 1 else f"{healing.steps} steps"
    line = (
        f"distillation of {steps}: mean KL on held-out windows {healing.kl_before:.5f} → "
        f"{healing.kl_after:.5f}"
    )
    return line if healing.best_step else f"{line}; no step was an improvement"


def _read_back_line(result: ReadBack) -> str:
    line = f"read back: ok (logits within {result.difference:.1e} of the converted model's"
    if result.transformers is None:
        return f"{line}; not compared with transformers)"
    return f"{line}, with transformers {result.transformers} within {result.transformers_difference:.1e})"


def frontier_table(report: BuildReport) -> Table:
    """One row for each cache size that was considered, with its predicted and measured loss."""
    table = plain_table("KV cache per token", "fraction", "predicted KL", "measured KL", "")
    for point in report.frontier:
        chosen = point.kv_bytes_per_token == report.kv_bytes_per_token
        table.add_row(
            size(point.kv_bytes_per_token),
            f"{point.kv_bytes_per_token / report.kv_bytes_per_token_original:.1%}",
            f"{point.predicted_kl:.5f}",
            "" if point.measured_kl is None else f"{point.measured_kl:.5f}",
            "chosen" if chosen else "",
        )
    return table


def print_validation(report: ValidationReport) -> None:
    """Print the worst output of each kind over all layers, and the verdict."""
    table = plain_table("worst output", "cosine", "norm ratio", "max error / rms", "")
    for kind in report.compared:
        worst = report.worst(kind)
        passed = not any(d.failed for d in report.differences if d.name.split(".")[-1] == kind)
        table.add_row(
            worst.name,
            f"{worst.cosine:.7f}",
            f"{worst.norm_ratio:.5f}",
            f"{worst.max_error:.2e}",
            "ok" if passed else "FAILED",
        )
    out = PlainConsole()
    out.print(table)
    out.print_line(_verdict(report))
    rounding = report.int8_activations
    if rounding is not None:
        out.print_line(
            "`kvexport run` rounds activations to int8 on the CPU, which the table is without: mean KL "
            f"{rounding.mean_kl:.5f}, same top token {rounding.top1_agreement:.1%}, largest error of a logit "
            f"{rounding.max_error:.2g} of their root mean square"
        )


def print_evaluation(evaluation: Evaluation) -> None:
    """Print the original model and the bundle side by side."""
    table = plain_table("", "original", "bundle")
    table.add_row(
        "KV cache per token",
        size(evaluation.kv_bytes_per_token_original),
        size(evaluation.kv_bytes_per_token),
    )
    _add_divergence(table, evaluation.divergence)
    out = PlainConsole()
    out.print(table)
    out.print_line(f"(on {evaluation.divergence.tokens} tokens)")


def _add_divergence(table: Table, divergence: Divergence) -> None:
    table.add_row(
        "cross-entropy, nats per token",
        f"{divergence.cross_entropy_original:.4f}",
        f"{divergence.cross_entropy:.4f}",
    )
    table.add_row("perplexity", f"{divergence.perplexity_original:.3f}", f"{divergence.perplexity:.3f}")
    table.add_row("mean KL to the original, nats per token", "", f"{divergence.mean_kl:.5f}")
    table.add_row("same top token", "", f"{divergence.top1_agreement:.1%}")


def _verdict(report: ValidationReport) -> str:
    details = (
        f"prefill of {report.prefill} tokens and {report.steps} decode steps, "
        f"greedy agreement {report.greedy_agreement:.1%}"
    )
    if report.computed_in != report.dtype:
        details += f", computed in {report.computed_in} (this machine has no {report.dtype} kernels)"
    if report.provider != "cpu":
        details += f", on {report.provider}: {', '.join(report.compared)}"
    return f"{'FAILED' if report.failures else 'ok'} ({details})"
