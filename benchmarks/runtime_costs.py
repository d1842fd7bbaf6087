"""Measure two costs that must stay constant: the start of the command line, and a decode step at a larger
capacity.

Builds the demo model with all its heads twice, with a small and a large capacity, and decodes both at the
same depth, alternating step by step in one process. Times `kvexport --help` in new processes. Writes times
and medians to benchmarks/results/runtime_costs.json.

    python benchmarks/runtime_costs.py
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kvexport
from kvexport.build.pipeline import BuildOptions, build
from kvexport.calibrate import recipe_for
from kvexport.convert.request import CompressionRequest
from kvexport.files.resources import resource
from kvexport.progress import Progress

RECORD = Path(__file__).parent / "results" / "runtime_costs.json"
CAPACITIES = (512, 65536)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime [default: 1]")
    parser.add_argument("--depth", type=int, default=300, help="tokens in the cache [default: 300]")
    parser.add_argument("--steps", type=int, default=200, help="timed decode steps [default: 200]")
    parser.add_argument(
        "--starts", type=int, default=15, help="timed starts of the command line [default: 15]"
    )
    parser.add_argument("--output", type=Path, default=RECORD, help="file of the record")
    arguments = parser.parse_args()
    help_seconds = summary([start_up() for _ in range(arguments.starts)])
    step_ms = decode_steps(arguments.threads, arguments.depth, arguments.steps)
    record = {
        "kvexport": kvexport.__version__,
        "machine": f"{platform.machine()}, Python {platform.python_version()}, {arguments.threads} threads",
        "help_seconds": help_seconds,
        "decode_step_ms": step_ms,
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    rows = {"kvexport --help, seconds": help_seconds}
    rows |= {f"decode step, {name}, milliseconds": times for name, times in step_ms.items()}
    for name, times in rows.items():
        low, high = times["quartiles"]
        print(f"{name}: median {times['median']}, quartiles {low} to {high}, {len(times['raw'])} samples")


def start_up() -> float:
    """Seconds of `kvexport --help` in a new process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "kvexport", "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def decode_steps(threads: int, depth: int, steps: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of a decode step at the same depth, at each of two capacities."""
    with tempfile.TemporaryDirectory() as folder:
        options = BuildOptions(recipe_for("random"), CompressionRequest(kv_ratio=1.0))
        sessions = {}
        for capacity in CAPACITIES:
            source, bundle = Path(folder) / f"model-{capacity}", Path(folder) / str(capacity)
            write_checkpoint(source, capacity)
            build(source, bundle, options, Progress(), capacity=capacity)
            sessions[capacity] = kvexport.open(bundle, threads=threads)
            sessions[capacity].prefill([1] * depth)
        raw: dict[int, list[float]] = {capacity: [] for capacity in sessions}
        for step in range(steps):
            for capacity in sorted(sessions, reverse=step % 2 == 1):
                start = time.perf_counter()
                sessions[capacity].step([2])
                raw[capacity].append((time.perf_counter() - start) * 1000)
        return {f"capacity limit {capacity}": summary(times) for capacity, times in raw.items()}


def write_checkpoint(folder: Path, positions: int) -> None:
    """Copy the demo checkpoint with another maximum length; the time of a step does not depend on
    training."""
    folder.mkdir()
    for file in resource("models", "demo").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": positions}), encoding="utf-8"
    )


def summary(times: list[float]) -> dict[str, Any]:
    """Median, quartiles and all times, rounded."""
    quartiles = statistics.quantiles(times, n=4)
    return {
        "median": round(statistics.median(times), 4),
        "quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
        "raw": [round(each, 4) for each in times],
    }


if __name__ == "__main__":
    main()
