"""Measure the loss from conversion at equal KV bytes: methods, ablations and published neighbours, on
held-out text.

All rows convert one checkpoint from the same calibration windows and are compared with the trained model on
the same evaluation windows, in PyTorch float32. The record (OUTPUT.json) is rewritten after every row, so
that an interruption loses one row at most; --resume continues it. A table (OUTPUT.md) and charts (OUTPUT.svg,
and OUTPUT-long.svg over offsets of the context) are made from it.

    python benchmarks/quality.py CHECKPOINT --text tinystories=heldout.txt --text wikitext2=test.txt
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quality_long import TRAINED, curve, lines
from quality_measure import Bench, Made, digest, source_digest
from quality_plot import offsets_chart, overview
from quality_rows import Row, rows
from quality_table import markdown, predictions
from records import RESULTS, fill, named, record_file, resumed, save

from kvexport import __version__
from kvexport.calibrate import recipe_for
from kvexport.calibrate.recipe import DEFAULT
from kvexport.errors import UsageError


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--text",
        action="append",
        required=True,
        metavar="NAME=FILE",
        help="evaluation text; may be given several times",
    )
    parser.add_argument("--ratios", type=Fraction, nargs="+", default=[Fraction(1, n) for n in (2, 3, 4, 8)])
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PATTERN",
        help="rows to measure, by name or name and ratio: 'auto*' 'svd-a 1/2'",
    )
    parser.add_argument(
        "--calibration",
        default=DEFAULT,
        help="calibration source, as in `kvexport build`: mixed, self, random or a text",
    )
    parser.add_argument("--samples", type=int, help="calibration windows")
    parser.add_argument("--calibration-length", type=int, help="tokens in a calibration window")
    parser.add_argument("--length", type=int, default=256, help="tokens in an evaluation window")
    parser.add_argument(
        "--windows", type=int, default=128, help="maximum number of evaluation windows of each text"
    )
    parser.add_argument("--long", type=int, default=4096, help="length of the long context in tokens")
    parser.add_argument("--max-kl", type=float, nargs="*", default=[0.005, 0.02, 0.05], metavar="BOUND")
    parser.add_argument(
        "--heal", type=int, metavar="STEPS", help="also measure healed rows, which take minutes each"
    )
    parser.add_argument(
        "--piqa", type=Path, metavar="FOLDER", help="folder with valid.jsonl and valid-labels.lst of PIQA"
    )
    parser.add_argument("--passkey", type=Path, metavar="FILE", help="text in which passkeys are hidden")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "quality", help="path of the output files without suffix"
    )
    parser.add_argument("--resume", action="store_true", help="continue the rows of OUTPUT.json")
    arguments = parser.parse_args(given)
    try:
        run(arguments)
    except UsageError as error:
        parser.error(str(error))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure what the record does not have yet; returns the record, which is also on disk.

    Raises:
        UsageError: something given cannot be read, or --resume of a record of other settings.
    """
    recipe = recipe_for(arguments.calibration, arguments.samples, arguments.calibration_length)
    bench = Bench(
        arguments.checkpoint,
        recipe,
        named(arguments.text),
        arguments.length,
        arguments.windows,
        arguments.piqa,
        arguments.passkey,
    )
    record = begin(bench, arguments)
    work: dict[str, Callable[[], dict[str, Any]]] = {
        row.key: partial(figures_of, bench, row, record["original"].get("tasks"))
        for row in rows(arguments.ratios, arguments.long, arguments.heal, arguments.max_kl)
    }
    work |= {
        f"long-{name}": partial(curve, bench, name, arguments.long)
        for name in (TRAINED, *lines(arguments.length, arguments.long))
    }
    fill(record, work, arguments.only, partial(write, record, arguments.output), partial(told, record))
    return record


def begin(bench: Bench, arguments: argparse.Namespace) -> dict[str, Any]:
    """A record with the trained model alone, or the one that --resume goes on with.

    Raises:
        UsageError: that one cannot be read, or is of other settings.
    """
    settings = {
        **bench.settings(),
        "calibration": {**bench.recipe.to_json(), "tokens_sha256": digest(bench.calibration())},
        "long": arguments.long,
        "piqa": None if bench.piqa is None else len(bench.piqa),
        "passkey": bench.passkey is not None,
        "kvexport": __version__,
        "torch": torch.__version__,
        "code_sha256": source_digest(),
    }
    if arguments.resume:
        return resumed(record_file(arguments.output), settings)
    original = bench.measured(Made.of(bench.decoder))
    if bench.piqa is not None or bench.passkey is not None:
        original["tasks"] = bench.task_figures(Made.of(bench.decoder).run)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    empty: dict[str, Any] = {"rows": {}, "left_out": {}, "predictions": {}}
    return {"settings": settings, "machine": machine, "original": original, **empty}


def figures_of(bench: Bench, row: Row, original_tasks: dict[str, Any] | None) -> dict[str, Any]:
    """A row, made and measured; `seconds` are of making it."""
    start, processor = time.perf_counter(), time.process_time()
    made = row.make(bench)
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor
    figures = {
        "section": row.section,
        "name": row.name,
        "ratio": None if row.ratio is None else str(row.ratio),
        "what": row.what,
        **bench.measured(made),
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor_seconds, 1),
    }
    if row.has_tasks and original_tasks is not None:
        figures["tasks"] = bench.task_figures(made.run, original_tasks)
    if "max_kl" in figures:
        figures["kept"] = {
            name: each["mean_kl"] <= figures["max_kl"] for name, each in figures["texts"].items()
        }
    return figures


def write(record: dict[str, Any], output: Path) -> None:
    """The record, replaced whole, and what is made of it."""
    record["predictions"] = predictions(record)
    save(record, output, markdown(record), {"": overview(record), "-long": offsets_chart(record)})


def told(record: dict[str, Any], key: str) -> str:
    if key in record["left_out"]:
        return f"left out: {record['left_out'][key]}"
    figures = record["rows"][key]
    if "kl" in figures:
        return ", ".join(
            f"{name} KL {' '.join(f'{kl:.4f}' for kl in found)}" for name, found in figures["kl"].items()
        )
    return (
        ", ".join(f"{name} KL {each['mean_kl']:.4f}" for name, each in figures["texts"].items())
        + f", {figures['seconds']:g} s"
    )


if __name__ == "__main__":
    main()
