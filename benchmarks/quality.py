"""What each conversion method costs at equal KV bytes: mean KL, cross-entropy, top-1 agreement, on held-out text.

Every method converts the same checkpoint from the same calibration windows in one run, without fine-tuning, and is
compared with the original on the same windows, both in PyTorch float32. Writes a table (Markdown) and the raw
record (JSON) into benchmarks/results/. Knows the methods by name only.

    python benchmarks/quality.py CHECKPOINT --text heldout=heldout.txt --text wikitext2=test.txt
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from kvexport import __version__, reference
from kvexport.calibrate import calibration_windows, recipe_for
from kvexport.calibrate.text import all_windows, read_text, tokenize
from kvexport.checkpoint import Checkpoint
from kvexport.convert import METHOD_NAMES, convert, kv_heads_for
from kvexport.divergence import DivergenceMeter
from kvexport.loading import load_decoder
from kvexport.progress import Progress
from kvexport.validate.cost import original_stream, spread

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE", help="an evaluation text; repeat")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--methods", nargs="+", default=list(METHOD_NAMES))
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--length", type=int, default=256, help="tokens in an evaluation window")
    parser.add_argument("--windows", type=int, default=256, help="the most evaluation windows of each text")
    parser.add_argument("--output", type=Path, default=RESULTS / "quality")
    arguments = parser.parse_args()

    record = run(arguments)
    arguments.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = table(record)
    arguments.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


@torch.no_grad()
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    checkpoint = Checkpoint(arguments.checkpoint)
    decoder = load_decoder(checkpoint)
    decoder = dataclasses.replace(decoder, layers=list(decoder.layers))
    recipe = recipe_for(arguments.calibration)
    windows = calibration_windows(decoder, checkpoint.path, recipe)
    texts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for said in arguments.text:
        name, _, file = said.partition("=")
        ids = tokenize(checkpoint.path, read_text(Path(file)))
        tokens = spread(all_windows(ids, arguments.length, file), arguments.windows)
        texts[name] = tokens, original_stream(decoder, tokens, Progress())
    trained = decoder.layers[0].attention.num_kv_heads
    rows = []
    for ratio in arguments.ratios:
        for method in arguments.methods:
            start = time.perf_counter()
            layers = list(convert(decoder, windows, kv_heads_for(trained, None, ratio), method))
            seconds = time.perf_counter() - start
            converted = dataclasses.replace(decoder, layers=[each.layer for each in layers])
            measured = {}
            for name, (tokens, stream) in texts.items():
                meter = DivergenceMeter()
                compressed = original_stream(converted, tokens, Progress())
                for at in range(0, len(tokens), 8):
                    batch = slice(at, at + 8)
                    meter.add(
                        reference.logits(decoder, stream[batch]), reference.logits(decoder, compressed[batch]), tokens[batch]
                    )
                measured[name] = meter.finish().to_json()
            reports = [dataclasses.asdict(each.report) for each in layers]
            rows.append({"ratio": ratio, "method": method, "seconds": seconds, "texts": measured, "layers": reports})
            figures = ", ".join(f"{name} KL {figure['mean_kl']:.4f}" for name, figure in measured.items())
            print(f"{ratio:g} {method}: {figures}", flush=True)
    return {
        "kvexport": __version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "model": {"name": checkpoint.path.resolve().name, "sha256": checkpoint.digest(), "num_key_value_heads": trained},
        "calibration": recipe.to_json(),
        "evaluation": {"length": arguments.length, "windows": {name: len(tokens) for name, (tokens, _) in texts.items()}},
        "rows": rows,
    }


def table(record: dict[str, Any]) -> str:
    names = list(record["evaluation"]["windows"])
    model, calibration = record["model"], record["calibration"]
    tokens = ", ".join(f"{name} {record['rows'][0]['texts'][name]['tokens']} predictions" for name in names)
    lines = [
        f"# Cost of conversion on {model['name']}, {model['num_key_value_heads']} KV heads, no fine-tuning",
        "",
        f"Calibration: {calibration['source']}, {calibration['samples']} windows of {calibration['length']} tokens, "
        f"seed {calibration['seed']}. Evaluation: {tokens}, windows of {record['evaluation']['length']} tokens. "
        "PyTorch float32, all rows in one run. KL and cross-entropy (CE) in nats per token.",
        "",
        "| KV bytes | method | " + " | ".join(f"{name}: KL | CE | top-1" for name in names) + " | KL / svd-a |",
        "|---|---|" + "---|---|---|" * len(names) + "---|",
    ]
    for row in record["rows"]:
        paper = next((r for r in record["rows"] if r["ratio"] == row["ratio"] and r["method"] == "svd-a"), None)
        figures = [row["texts"][name] for name in names]
        cells = [f"{each['mean_kl']:.4f} | {each['cross_entropy']:.4f} | {each['top1_agreement']:.3f}" for each in figures]
        theirs = [paper["texts"][name]["mean_kl"] for name in names] if paper else []
        share = ", ".join(f"{each['mean_kl'] / their:.2f}" for each, their in zip(figures, theirs, strict=False))
        lines.append(f"| {row['ratio']:g} | {row['method']} | " + " | ".join(cells) + f" | {share} |")
    original = ", ".join(f"{name} {record['rows'][0]['texts'][name]['cross_entropy_original']:.4f}" for name in names)
    return "\n".join([*lines, "", f"The original's cross-entropy: {original}.", ""])


if __name__ == "__main__":
    main()
