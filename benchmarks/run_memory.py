"""Measure the peak resident memory of `kvexport run` on the CPU, beside the bytes of weights and KV cache.

Runs `kvexport run` in new processes, with prompts of several lengths, and a process that only imports what a
run imports: the fixed cost of Python, ONNX Runtime and the tokenizer's library. The ratio of the peak to
weights and cache is given with and without that cost. Writes benchmarks/results/run_memory.json.

    python benchmarks/run_memory.py BUNDLE [BUNDLE ...]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kvexport
from kvexport.bundle import DATA_FILE, Bundle

RECORD = Path(__file__).parent / "results" / "run_memory.json"
IMPORTS = "import numpy, onnxruntime, tokenizers, kvexport.cli.run, kvexport.runtime"
AT_MOST = 1.5  # times weights and cache
WORDS = " red green blue"  # of the prompt, repeated
UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument(
        "--prompts", type=int, nargs="+", default=[16, 512, 2048], help="tokens of the prompts [16 512 2048]"
    )
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate [default: 32]")
    parser.add_argument("--threads", type=int, default=2, help="threads of ONNX Runtime [default: 2]")
    parser.add_argument("--output", type=Path, default=RECORD, help="file of the record")
    arguments = parser.parse_args()
    floor, _ = peak(sys.executable, "-c", IMPORTS)
    runs = [
        of_run(bundle, prompt, floor, arguments)
        for bundle in arguments.bundles
        for prompt in arguments.prompts
    ]
    record = {
        "kvexport": kvexport.__version__,
        "machine": f"{platform.machine()}, Python {platform.python_version()}, {arguments.threads} threads",
        "imports_bytes": floor,
        "at_most": AT_MOST,
        "runs": runs,
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"imports: {floor / 1e6:.0f} MB")
    for run in runs:
        print(
            f"{run['bundle']}, prompt of {run['prompt']}: peak {run['peak_bytes'] / 1e6:.0f} MB, weights "
            f"{run['weights_bytes'] / 1e6:.0f} MB, cache {run['cache_bytes'] / 1e6:.0f} MB: "
            f"{run['ratio']:.2f} times, {run['ratio_without_imports']:.2f} times without imports"
        )


def of_run(path: Path, prompt: int, floor: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak of one run; a word of the prompt is one token in common tokenizers."""
    text = (WORDS * prompt).split()[:prompt]
    options = ("--max-new-tokens", arguments.new_tokens, "--threads", arguments.threads, "--provider", "cpu")
    command = (sys.executable, "-m", "kvexport", "run", path, "--prompt", " ".join(text), *options)
    highest, messages = peak(*map(str, command))
    allocated = re.search(r"([\d.]+) (B|KiB|MiB|GiB) allocated", messages)
    if allocated is None:
        raise SystemExit(messages)
    weights = Bundle.open(path).files[DATA_FILE].bytes
    cache = round(float(allocated[1]) * UNITS[allocated[2]])
    return {
        "bundle": path.name,
        "prompt": prompt,
        "peak_bytes": highest,
        "weights_bytes": weights,
        "cache_bytes": cache,
        "ratio": round(highest / (weights + cache), 3),
        "ratio_without_imports": round((highest - floor) / (weights + cache), 3),
    }


def peak(*command: str) -> tuple[int, str]:
    """Peak resident bytes of a command, and what it prints to standard error."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    messages = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(messages)
    return usage.ru_maxrss * 1024, messages


if __name__ == "__main__":
    main()
