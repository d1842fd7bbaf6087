"""Measure the loss from conversion by calibration text: shipped, sampled from the model, random, real.

Every row plans and converts as `kvexport build --kv-ratio 0.5` does, calibrated on its own text, and is
compared with the trained model on the same evaluation windows, in PyTorch float32. The record (OUTPUT.json)
and its table (OUTPUT.md) are rewritten after every row; --resume continues them.

    python benchmarks/calibration_text.py CHECKPOINT --text prose=test.txt --text code=code.txt \\
        --calibration wikitext103=train.txt --calibration mixed --calibration self
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quality_measure import Bench, Made, digest, source_digest
from records import RESULTS, fill, named, record_file, resumed, save

from kvexport import __version__
from kvexport.calibrate import Recipe, recipe_for
from kvexport.calibrate.recipe import BUILT_IN, DEFAULT
from kvexport.convert import CompressionRequest, methods_for, plan_compression
from kvexport.errors import UsageError
from kvexport.progress import Progress


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
    parser.add_argument(
        "--calibration",
        action="append",
        required=True,
        metavar="SOURCE|NAME=FILE",
        help="calibration text: mixed, self, random or a file; may be given several times",
    )
    parser.add_argument("--samples", type=int, help="calibration windows")
    parser.add_argument("--length", type=int, default=256, help="tokens in an evaluation window")
    parser.add_argument(
        "--windows", type=int, default=16, help="maximum number of evaluation windows of each text"
    )
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the cache that is kept")
    parser.add_argument(
        "--output", type=Path, help="path of the output files without suffix [results/calibration_text-MODEL]"
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
    recipes = _recipes(arguments.calibration, arguments.samples)
    bench = Bench(
        arguments.checkpoint,
        recipe_for(DEFAULT, arguments.samples),
        named(arguments.text),
        arguments.length,
        arguments.windows,
    )
    name = bench.checkpoint.path.resolve().name
    output = arguments.output or RESULTS / f"calibration_text-{name}"
    settings = {
        **bench.settings(),
        "ratio": arguments.ratio,
        "kvexport": __version__,
        "torch": torch.__version__,
        "code_sha256": hashlib.sha256((source_digest() + Path(__file__).read_text()).encode()).hexdigest(),
    }
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    record: dict[str, Any] = {"settings": settings, "machine": machine, "rows": {}, "left_out": {}}
    if arguments.resume:
        record = resumed(record_file(output), settings)
    fill(
        record,
        {key: partial(_row, bench, recipe, arguments.ratio) for key, recipe in recipes.items()},
        None,
        lambda: save(record, output, markdown(record), {}),
        lambda key: json.dumps(record["rows"].get(key, record["left_out"].get(key))),
    )
    return record


def _recipes(given: Sequence[str], samples: int | None) -> dict[str, Recipe]:
    """Recipes by the name of their row."""
    found: dict[str, Recipe] = {}
    for each in given:
        sources = {each: each} if each in BUILT_IN else named([each])
        found |= {name: recipe_for(str(source), samples) for name, source in sources.items()}
    return found


def _row(bench: Bench, recipe: Recipe, ratio: float) -> dict[str, Any]:
    """Plan, convert and measure with one calibration text; KL in nats per token."""
    start = time.perf_counter()
    windows = bench.calibration(recipe)
    text_seconds = time.perf_counter() - start
    request = CompressionRequest(kv_ratio=ratio)
    methods = methods_for("auto", bench.attention)
    plan = plan_compression(bench.decoder, windows, request, methods, None, bench.length, Progress())
    converted, _ = bench.convert(plan.layer_plans, windows=windows)
    seconds = time.perf_counter() - start
    return {
        "calibration": recipe.to_json() | {"windows": len(windows), "tokens_sha256": digest(windows)},
        "kl": {name: each["mean_kl"] for name, each in bench.divergences(Made.of(converted).run).items()},
        "text_seconds": round(text_seconds, 1),
        "seconds": round(seconds, 1),
    }


def markdown(record: dict[str, Any]) -> str:
    """The table of a record."""
    settings, texts = record["settings"], list(record["settings"]["texts"])
    windows = ", ".join(f"{name} {each['windows']}" for name, each in settings["texts"].items())
    lines = [
        f"# Calibration text: {settings['model']['name']}, {settings['ratio']:g} of the cache",
        "",
        "Mean KL to the original on evaluation text, nats per token "
        f"(windows of {settings['length']} tokens: {windows}).",
        "",
        f"| calibrated on | {' | '.join(texts)} | text, s | all, s |",
        f"|---|{'---:|' * (len(texts) + 2)}",
    ]
    for name, row in record["rows"].items():
        figures = " | ".join(f"{row['kl'][text]:.4f}" for text in texts)
        lines.append(f"| {name} | {figures} | {row['text_seconds']:g} | {row['seconds']:g} |")
    lines += ["", f"Machine: {record['machine']}, shared with other work: the times are upper bounds.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
