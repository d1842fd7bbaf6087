"""Run every check, timing and memory measurement that needs a GPU in one command, in less than ten minutes.

Each part is a process with a time limit; a part that fails is recorded, and the others continue. Exit codes:
0, all parts ran; 1, a part failed or had no time; 2, invalid arguments; 3, there is no NVIDIA GPU. README.md
in this folder describes the parts.

    python benchmarks/gpu/run.py
    python benchmarks/gpu/run.py --rehearse      tiny models on the CPU, to try the script itself
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))  # kvexport need not be installed

from machine import describe_gpu, versions, without_paths  # noqa: E402
from processes import run_limited  # noqa: E402
from settings import Settings, real, rehearsal  # noqa: E402
from summary import render  # noqa: E402

from kvexport.devices.gpu import find_gpu  # noqa: E402

RESULTS = HERE.parent / "results"
REHEARSED = ROOT / "build" / "gpu-rehearsal"
_LEAST = 10.0  # seconds that must be left to start a part


@dataclass(frozen=True)
class Part:
    """One question.

    Attributes:
        script: a file beside this one, and what it is told.
        limit: seconds.
    """

    name: str
    script: tuple[str, ...]
    limit: float
    question: str


# Those of one stage run at the same time: nothing of the first is timed. What matters most comes first.
STAGES = (
    (
        Part("models", ("part_models.py",), 170, "Two checkpoints of random weights, and their bundles"),
        Part("rtx", ("part_rtx.py",), 170, "Does TensorRT-RTX run its engines on this GPU?"),
    ),
    (
        Part(
            "convert",
            ("part_convert.py",),
            120,
            "Does a build on the GPU give the CPU's bundle, and how fast is each stage?",
        ),
    ),
    (Part("onnxruntime", ("part_onnxruntime.py",), 80, "ONNX Runtime on CUDA: is it valid, and how fast?"),),
    (Part("pytorch", ("part_pytorch.py",), 160, "PyTorch on the same GPU, eager and compiled: how fast?"),),
    (
        Part(
            "memory", ("part_memory.py",), 60, "Device memory: how much was planned, and how much is in use?"
        ),
    ),
    (
        Part(
            "engine-std24",
            ("part_engine.py", "std24"),
            110,
            "A TensorRT engine, std24: is it valid, and how fast?",
        ),
    ),
    (
        Part(
            "engine-decomposed17",
            ("part_engine.py", "decomposed17"),
            110,
            "A TensorRT engine, decomposed17: is it valid, and how fast?",
        ),
    ),
    (
        Part(
            "onnxruntime-again",
            ("part_onnxruntime.py", "again"),
            40,
            "ONNX Runtime once more: did the machine drift?",
        ),
    ),
)
PARTS = tuple(part for stage in STAGES for part in stage)
_ALTERNATION = (
    "kvexport's two bundles take turns step by step in one process, and so do PyTorch's four sides in "
    "another; kvexport and "
    "PyTorch do not take turns, nor do TensorRT's engines: kvexport on ONNX Runtime is measured before "
    "and after them"
)


class Run:
    """One run: its clock, its settings, its records."""

    def __init__(self, settings: Settings, output: Path, deadline: float) -> None:
        self.settings, self.output, self._until = settings, output, time.monotonic() + deadline
        self._file, self._stop = settings.write(), threading.Event()
        self._shared: dict[str, Any] = {
            "rehearsal": settings.rehearsal,
            "begun": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "gpu": describe_gpu(),
            "versions": versions(),
            "settings": settings.described(),
            "alternation": _ALTERNATION,
        }
        python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self._environment = {**os.environ, "PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1"}

    def part(self, part: Part) -> dict[str, Any]:
        """Run one part and write its record."""
        settings, limit = self.settings, min(part.limit, self._until - time.monotonic())
        result = settings.result(part.name)
        result.unlink(missing_ok=True)
        record: dict[str, Any] = {
            "part": part.name,
            "question": part.question,
            **self._shared,
            "limit_seconds": round(limit),
        }
        if limit < _LEAST:
            record |= {
                "status": "failed",
                "exit_code": None,
                "timed_out": True,
                "seconds": 0.0,
                "result": {},
                "commands": [],
                "failures": ["no time was left"],
                "last_words": [],
            }
        else:
            print(f"{part.name}: {part.question}", file=sys.stderr, flush=True)
            script, *told = part.script
            command = [sys.executable, str(HERE / script), str(self._file), str(result), str(limit), *told]
            ended = run_limited(
                command, limit, settings.work / f"{part.name}.log", self._environment, self._stop
            )
            found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
            bad = ended.exit_code != 0 or ended.timed_out
            status = "failed" if bad else "left out" if "left_out" in found.get("result", {}) else "ran"
            record |= {
                "status": status,
                "exit_code": ended.exit_code,
                "timed_out": ended.timed_out,
                "seconds": ended.seconds,
                "result": found.get("result", {}),
                "commands": found.get("commands", []),
                "failures": found.get("failures", []),
                "last_words": ended.last_words if bad else [],
            }
        record = json.loads(without_paths(json.dumps(record), settings.work))
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / f"{part.name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(
            f"{part.name}: {record['status']}, {record['seconds']:.0f} of {limit:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        return record

    def all(self, wanted: set[str]) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        for stage in STAGES:
            chosen = [part for part in stage if part.name in wanted]
            if chosen:
                with ThreadPoolExecutor(len(chosen)) as pool:
                    futures = [pool.submit(self.part, part) for part in chosen]
                    try:
                        records += [future.result() for future in futures]
                    except BaseException:
                        self._stop.set()  # or leaving the pool would wait for the parts
                        raise
        return records


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny models on the CPU, to try the script")
    parser.add_argument(
        "--only",
        metavar="PART,...",
        help=f"parts to run, of {', '.join(part.name for part in PARTS)}; needs --work",
    )
    parser.add_argument("--work", type=Path, help="folder that keeps models and logs for the next run")
    parser.add_argument("--output", type=Path, help="folder of the records [default: benchmarks/results/gpu]")
    parser.add_argument("--deadline", type=float, default=590, help="seconds for all parts [default: 590]")
    arguments = parser.parse_args()
    wanted = {part.name for part in PARTS} if arguments.only is None else set(arguments.only.split(","))
    if unknown := wanted - {part.name for part in PARTS}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    output = (arguments.output or (REHEARSED if arguments.rehearse else RESULTS / "gpu")).resolve()
    if arguments.rehearse and output.is_relative_to(RESULTS):
        parser.error("a rehearsal is no result: --output must be outside benchmarks/results")
    capability = None
    if not arguments.rehearse:
        gpu = find_gpu()
        if gpu is None:
            print(
                "no NVIDIA GPU or driver was found, so nothing was run; try the script with --rehearse",
                file=sys.stderr,
            )
            return 3
        capability = gpu.compute_capability

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)  # so that the parts are ended, and the work folder removed
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        work = (arguments.work or Path(folder)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        settings = rehearsal(work) if capability is None else real(work, capability)
        records = Run(settings, output, arguments.deadline).all(wanted)
    text = render(records)
    (output / "summary.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"{time.monotonic() - begin:.0f} seconds in total; records in {output}", file=sys.stderr)
    return 1 if any(record["status"] == "failed" for record in records) else 0


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted: the running parts were ended, the records are kept", file=sys.stderr)
        sys.exit(130)
