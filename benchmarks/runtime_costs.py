"""Two costs that must not grow: starting the command line, and a decode step under a larger capacity limit.

Builds the demo model with all its heads twice, with a small and a very large capacity limit, and runs both to the same
depth, alternating step by step in one process. Times `kvexport --help` in fresh processes. Writes raw times and
medians to benchmarks/results/runtime_costs.json. Knows the public runtime and the command line only.

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
from kvexport.files.resources import resource
from kvexport.progress import Progress

RECORD = Path(__file__).parent / "results" / "runtime_costs.json"
DEPTH, STEPS = 300, 200


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RECORD)
    arguments = parser.parse_args()
    record = {
        "kvexport": kvexport.__version__,
        "machine": f"{platform.machine()}, Python {platform.python_version()}, {arguments.threads} threads",
        "help_seconds": summary([start_up() for _ in range(15)]),
        "decode_step_ms": steps(arguments.threads),
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, figures in {"kvexport --help, s": record["help_seconds"], **record["decode_step_ms"]}.items():
        print(
            f"{name}: median {figures['median']}, quartiles {figures['quartiles']}, {len(figures['raw'])} runs"
        )


def start_up() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "kvexport", "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def steps(threads: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of a decode step at the same depth, under two capacity limits."""
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for limit in (512, 65536):
            bundle = Path(folder) / str(limit)
            source, plan = (
                unlimited(Path(folder) / f"model-{limit}", limit),
                BuildOptions(recipe_for("random"), kv_ratio=1.0),
            )
            build(source, bundle, plan, Progress(), capacity=limit)
            sessions[limit] = kvexport.open(bundle, threads=threads)
            sessions[limit].prefill([1] * DEPTH)
        raw: dict[int, list[float]] = {limit: [] for limit in sessions}
        for step in range(STEPS):
            for limit in sorted(sessions, reverse=step % 2 == 1):
                start = time.perf_counter()
                sessions[limit].step([2])
                raw[limit].append((time.perf_counter() - start) * 1000)
        return {f"capacity limit {limit}": summary(times) for limit, times in raw.items()}


def unlimited(folder: Path, positions: int) -> Path:
    """The demo checkpoint, declared good for that many positions: only the time of a step matters here."""
    folder.mkdir()
    for file in resource("models", "demo").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": positions}), encoding="utf-8"
    )
    return folder


def summary(times: list[float]) -> dict[str, Any]:
    quartiles = statistics.quantiles(times, n=4)
    return {
        "median": round(statistics.median(times), 4),
        "quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
        "raw": [round(each, 4) for each in times],
    }


if __name__ == "__main__":
    main()
