"""Reports as tables for people; knows how figures are shown, and nothing of how they are made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvexport.build.pipeline import BuildReport
    from kvexport.bundle.bundle import Bundle
    from kvexport.bundle.layer_report import LayerReport
    from kvexport.model.divergence import Divergence
    from kvexport.validate import ValidationReport
    from kvexport.validate.evaluate import Evaluation

_WIDTH = 100  # of tables where there is no terminal to ask


class PlainConsole(Console):
    """Shows text as it is: no markup, no emoji names, no colours of its own."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)
        if not self.is_terminal:
            self.width = _WIDTH

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit with 1, which is a failed gate's code

    def say(self, text: str) -> None:
        """A line that only the terminal breaks, so that paths in it stay whole."""
        self.print(text, soft_wrap=True)


def plain_table(*columns: str) -> Table:
    """A table of right-aligned columns, the first one left-aligned; a narrow terminal breaks figures, and hides none."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def facts_table() -> Table:
    """Names and what they are, side by side."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def size(count: float) -> str:
    """Bytes for people: 512 B, 1.5 KiB, ..."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def layer_table(layers: Iterable[LayerReport]) -> Table:
    """What became of each layer."""
    table = plain_table(
        "layer", "KV heads", "width", "method", "predicted error", "measured error", "residual error"
    )
    for index, layer in enumerate(layers):
        widths = dict.fromkeys(
            (layer.key_head_dim, layer.value_head_dim)
        )  # once, where keys and values have the same
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
    """What `inspect` says."""
    out = PlainConsole()
    out.print(layer_table(bundle.layers))
    table = facts_table()
    source, calibration = bundle.source, bundle.calibration or {}
    table.add_row("made of", f"{source.name} ({source.model_type}), sha256 {source.sha256[:12]}")
    if calibration:
        table.add_row("calibration", ", ".join(f"{key} {value}" for key, value in calibration.items()))
    table.add_row("made by", f"kvexport {bundle.version}")
    table.add_row("dtype, capacity", f"{bundle.dtype}, {bundle.capacity} tokens")
    table.add_row("KV cache per token", size(bundle.kv_bytes_per_token))
    table.add_row("  original", size(bundle.kv_bytes_per_token_original))
    if bundle.eviction is not None:
        table.add_row("KV budget", str(bundle.eviction))
    table.add_row("KV cache at capacity", size(bundle.kv_bytes(bundle.capacity)))
    table.add_row("text", _text(bundle))
    for name, entry in bundle.files.items():
        table.add_row(name, f"{size(entry.bytes)}, sha256 {entry.sha256[:12]}{' ok' if verified else ''}")
    out.print()
    out.print(table)


def _text(bundle: Bundle) -> str:
    from kvexport.bundle.bundle import TOKENIZER_FILE
    from kvexport.bundle.text_file import read_text_file

    if TOKENIZER_FILE not in bundle.files:
        return "token ids only"
    text = read_text_file(bundle)
    chat = None if text is None else text.chat
    if chat is None:
        return "no chat template"
    return "chat template" if chat.begin_system is not None else "chat template without a system prompt"


def print_build(report: BuildReport, output: Path, *, as_json: bool, quiet: bool) -> None:
    """What `build` and `compress` say of what they made."""
    if as_json:
        click.echo(json.dumps(report.to_json()))
        return
    if quiet:
        return
    out = PlainConsole()
    out.print(layer_table(report.layers))
    summary = plain_table("", "original", output.name)
    summary.add_row(
        "KV cache per token", size(report.kv_bytes_per_token_original), size(report.kv_bytes_per_token)
    )
    if report.capacity is not None and report.kv_bytes_at_capacity is not None:
        whole = report.kv_bytes_per_token_original * report.capacity
        summary.add_row(
            f"KV cache at {report.capacity} tokens", size(whole), size(report.kv_bytes_at_capacity)
        )
    summary.add_row("parameters", f"{report.parameters_original:,}", f"{report.parameters:,}")
    if report.divergence is not None:
        _divergence_rows(summary, report.divergence)
    out.print()
    if report.frontier:
        out.print(frontier_table(report))
        out.print()
    out.print(summary)
    if report.divergence is not None:
        out.say(f"(on {report.divergence.tokens} calibration tokens held out from the fit)")
    if report.healing is not None:
        healed = report.healing
        steps = "1 step" if healed.steps == 1 else f"{healed.steps} steps"
        out.say(
            f"healed in {steps}: held-out KL {healed.kl_before:.5f} → {healed.kl_after:.5f}"
            + ("" if healed.best_step else ", no step was better than what was given")
        )
    if report.eviction is not None:
        out.say(f"holds {report.eviction}; what that costs is not in the figures above")
    if report.validation is not None:
        out.say(f"\nproved against PyTorch: {_verdict(report.validation)}")
    seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in report.seconds.items())
    out.say(f"took {sum(report.seconds.values()):.1f} s ({seconds})")
    out.say(f"wrote {output}")


def frontier_table(report: BuildReport) -> Table:
    """What else could have been cached, and at what loss."""
    table = plain_table("KV cache per token", "share", "predicted KL", "measured KL", "")
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
    """The worst layer of each kind of array, and the verdict."""
    table = plain_table("worst of all layers", "cosine", "norm ratio", "max error / rms", "")
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
    out.say(_verdict(report))


def print_evaluation(result: Evaluation) -> None:
    """Original and bundle side by side."""
    table = plain_table("", "original", "bundle")
    table.add_row(
        "KV cache per token", size(result.kv_bytes_per_token_original), size(result.kv_bytes_per_token)
    )
    _divergence_rows(table, result.divergence)
    out = PlainConsole()
    out.print(table)
    out.say(f"(on {result.divergence.tokens} tokens)")


def _divergence_rows(table: Table, divergence: Divergence) -> None:
    table.add_row(
        "cross-entropy, nats per token",
        f"{divergence.cross_entropy_original:.4f}",
        f"{divergence.cross_entropy:.4f}",
    )
    table.add_row("perplexity", f"{divergence.perplexity_original:.3f}", f"{divergence.perplexity:.3f}")
    table.add_row("mean KL to the original, nats per token", "", f"{divergence.mean_kl:.5f}")
    table.add_row("same likeliest next token", "", f"{divergence.top1_agreement:.1%}")


def _verdict(report: ValidationReport) -> str:
    said = f"prefill of {report.prefill} and {report.steps} decode steps, greedy agreement {report.greedy_agreement:.1%}"
    if report.computed_in != report.dtype:
        said += f", computed in {report.computed_in} (this machine has no {report.dtype} kernels)"
    if report.provider != "cpu":
        said += f", on {report.provider}: {', '.join(report.compared)}"
    return f"{'FAILED' if report.failures else 'ok'} ({said})"
