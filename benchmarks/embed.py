"""Measure the overhead of embedding: the time of a step outside ONNX Runtime, in C++ and in Python.

Both run the same bundle at the same depth with the same threads, in alternating rounds. A clock inside the
step separates the engine's call from the rest: in C++ in `cpp/bench/step_overhead.cpp`, here by a wrapper of
`run_with_iobinding`. Also times the imports that opening a bundle needs, in new Python processes. Times and
medians go to benchmarks/results/embed.json.

    cmake -S cpp -B build/cpp -DKVEXPORT_BUILD_BENCHMARKS=ON -DONNXRUNTIME_ROOT=... && cmake --build build/cpp
    python benchmarks/embed.py demo --build build/cpp
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kvexport

RECORD = Path(__file__).parent / "results" / "embed.json"
IMPORTS = "import kvexport, kvexport.runtime.session, kvexport.runtime.backends.ort, onnxruntime, tokenizers"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="the demo bundle: make demo")
    parser.add_argument(
        "--build", type=Path, required=True, help="build folder of cpp/ with -DKVEXPORT_BUILD_BENCHMARKS=ON"
    )
    parser.add_argument("--depth", type=int, default=128, help="tokens in the cache [default: 128]")
    parser.add_argument("--steps", type=int, default=200, help="steps in each round [default: 200]")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each side [default: 5]")
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime [default: 1]")
    parser.add_argument("--output", type=Path, default=RECORD)
    arguments = parser.parse_args()
    sides: dict[str, dict[str, list[float]]] = {
        side: {"step_us": [], "engine_us": []} for side in ("c++", "python")
    }
    for _ in range(arguments.rounds):
        for side, measure in (("c++", in_cpp), ("python", in_python)):
            for name, values in measure(arguments).items():
                sides[side][name] += values
    record = {
        "kvexport": kvexport.__version__,
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "threads": arguments.threads,
        "depth": arguments.depth,
        "overhead_us": {
            side: summary(
                [whole - engine for whole, engine in zip(raw["step_us"], raw["engine_us"], strict=True)]
            )
            for side, raw in sides.items()
        },
        "engine_us": {side: summary(raw["engine_us"]) for side, raw in sides.items()},
        "import_seconds": summary([importing() for _ in range(9)]),
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for side in sides:
        figures, engine = record["overhead_us"][side], record["engine_us"][side]
        print(
            f"{side}: a step takes {figures['median']} us (quartiles {figures['quartiles']}) "
            f"in addition to the engine's {engine['median']} us"
        )
    print(f"imports: {record['import_seconds']['median']} s")


def in_cpp(arguments: argparse.Namespace) -> dict[str, list[float]]:
    numbers = map(str, (arguments.depth, arguments.steps, arguments.threads))
    command = [arguments.build / "step_overhead", arguments.bundle, *numbers]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def in_python(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """In a process of its own, as the C++ side."""
    numbers = map(str, (arguments.depth, arguments.steps, arguments.threads))
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]; import embed; embed.steps()",
    ]
    done = subprocess.run([*command, arguments.bundle, *numbers], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def steps() -> None:
    """What a process of `in_python` does: BUNDLE DEPTH STEPS THREADS in, JSON out."""
    import numpy as np
    import onnxruntime

    bundle, depth, count, threads = sys.argv[1], *map(int, sys.argv[2:])
    inside = 0.0
    whole, engine = [], []
    original = onnxruntime.InferenceSession.run_with_iobinding

    def timed(self: Any, *given: Any) -> Any:
        nonlocal inside
        start = time.perf_counter()
        result = original(self, *given)
        inside += time.perf_counter() - start
        return result

    onnxruntime.InferenceSession.run_with_iobinding = timed
    session = kvexport.open(bundle, provider="cpu", threads=threads)
    session.prefill([1] * depth)
    token = 1
    for step in range(-8, count):
        inside = 0.0
        start = time.perf_counter()
        logits = session.step([token])
        took = time.perf_counter() - start
        token = int(np.argmax(logits[0]))
        if step >= 0:
            whole.append(took * 1e6)
            engine.append(inside * 1e6)
    print(json.dumps({"step_us": whole, "engine_us": engine}))


def importing() -> float:
    """Seconds that a fresh Python takes to import everything that opening a bundle needs."""
    timed = f"import time; start = time.perf_counter()\n{IMPORTS}\nprint(time.perf_counter() - start)"
    return float(
        subprocess.run([sys.executable, "-c", timed], check=True, capture_output=True, text=True).stdout
    )


def summary(values: list[float]) -> dict[str, Any]:
    quartiles = statistics.quantiles(values, n=4)
    return {
        "median": round(statistics.median(values), 3),
        "quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
        "raw": [round(value, 3) for value in values],
    }


if __name__ == "__main__":
    main()
