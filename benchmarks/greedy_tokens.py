"""Compare the greedy tokens of an uncompressed bundle with those of transformers, on any checkpoint.

Builds the checkpoint with all its KV heads in float32, unless a bundle is given, and continues each prompt
greedily in both programs. Where a token differs, the record says by how much transformers preferred its own:
a gap of the size of float32 rounding is a tie. Writes benchmarks/results/greedy_tokens.json.

    python benchmarks/greedy_tokens.py CHECKPOINT
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import kvexport
from kvexport.build.pipeline import BuildOptions, build
from kvexport.calibrate import recipe_for
from kvexport.convert.request import CompressionRequest
from kvexport.progress import Progress

RECORD = Path(__file__).parent / "results" / "greedy_tokens.json"
PROMPTS = (
    "Once upon a time",
    "The robot arm moves to the left because",
    "def fibonacci(n):",
    "Water boils at a lower temperature on a mountain, since",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint, with its tokenizer")
    parser.add_argument("--bundle", type=Path, help="uncompressed float32 bundle of it [default: build one]")
    parser.add_argument("--tokens", type=int, default=200, help="tokens after each prompt [default: 200]")
    parser.add_argument("--output", type=Path, default=RECORD, help="file of the record")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle, seconds = arguments.bundle, None
        if bundle is None:
            bundle, start = Path(folder) / "bundle", time.perf_counter()
            options = BuildOptions(recipe_for("random"), CompressionRequest(kv_ratio=1.0))
            build(arguments.checkpoint, bundle, options, Progress())
            seconds = round(time.perf_counter() - start, 1)
        runs = compare(arguments.checkpoint, bundle, arguments.tokens)
    record = {
        "kvexport": kvexport.__version__,
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "checkpoint": arguments.checkpoint.name,
        "build_seconds": seconds,
        "runs": runs,
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for run in runs:
        print(f"{run['equal_tokens']} of {run['tokens']} tokens equal: {run['prompt']!r}")


def compare(checkpoint: Path, bundle: Path, count: int) -> list[dict[str, Any]]:
    """For each prompt the number of equal tokens before the first that differs, and the gap at that token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    session, runs = kvexport.open(bundle), []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        expected, logits = [], []
        inputs, cache = torch.tensor([ids]), None
        for _ in range(count):
            with torch.no_grad():
                output = model(inputs, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits[0, -1])
            expected.append(int(logits[-1].argmax()))
            inputs = torch.tensor([expected[-1:]])
        ours = greedy(session, ids, count)
        equal = next(
            (i for i, pair in enumerate(zip(ours, expected, strict=True)) if pair[0] != pair[1]), count
        )
        gap = None
        if equal < count:
            gap = float(logits[equal][expected[equal]] - logits[equal][ours[equal]])
        runs.append({"prompt": prompt, "tokens": count, "equal_tokens": equal, "gap_at_difference": gap})
    return runs


def greedy(session: kvexport.Session, ids: list[int], count: int) -> list[int]:
    """The `count` most likely tokens after `ids`, one after another, stop tokens included."""
    cache, tokens = session.new_cache(), []
    logits = session.prefill(ids, cache=cache)
    for _ in range(count):
        tokens.append(int(logits.argmax()))
        logits = session.step([tokens[-1]], cache=cache)
    return tokens


if __name__ == "__main__":
    main()
