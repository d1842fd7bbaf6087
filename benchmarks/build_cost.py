"""Measure seconds and peak memory of `kvexport build` by stage, beside a forward pass of transformers.

Builds llamas with random weights of 8, 16 and 32 layers of one shape, calibrated with random tokens, one of
1.1 billion parameters, and any checkpoints that are given, with their default calibration. Each is built at
half of the KV cache, and all but the largest then at a quarter, which reuses the saved analysis. Before every
build, transformers runs forward over as many tokens as the build calibrates on. A llama of the shape of
Llama-3.1-8B is built with its whole cache and int4 weights, rounded to nearest; it does not fit into memory
in transformers. Builds and forward passes run in processes of their own. Processor seconds (of all threads)
are recorded beside seconds; other work on the machine hardly changes them. Writes
benchmarks/results/build_cost.json.

    python benchmarks/build_cost.py FOLDER --checkpoint SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from random_llama import write_checkpoint

import kvexport
from kvexport.calibrate.recipe import DEFAULT, recipe_for
from kvexport.progress import Progress

RECORD = Path(__file__).parent / "results" / "build_cost.json"
LAYERS = (8, 16, 32)
SHAPE = {"hidden": 512, "intermediate": 1408, "vocab": 8192}
LARGE = {"layers": 22, "hidden": 2048, "intermediate": 4480, "vocab": 32000}  # 1.1e9 parameters
LLAMA_8B = {
    "layers": 32,
    "hidden": 4096,
    "intermediate": 14336,
    "vocab": 128256,
    "kv_heads": 8,
    "head_dim": 128,
}
RATIOS = (0.5, 0.25)
_SAMPLING_SECONDS = 0.02
_BATCH = 8  # windows of a forward pass


@dataclass(frozen=True)
class Case:
    """A model to build.

    Attributes:
        name: of the case.
        source: folder of the checkpoint.
        shape: of the llama with random weights that is written there; None: the checkpoint exists.
        ratios: shares of the KV cache to build with, in order.
        options: of the builds, by the names of the command line's parameters.
        samples: calibration windows; None: as the command line says.
        compares: whether transformers runs forward before every build.
    """

    name: str
    source: Path
    shape: dict[str, int] | None = None
    ratios: Sequence[float] = RATIOS
    options: dict[str, Any] = field(default_factory=dict)
    samples: int | None = None
    compares: bool = True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="work folder; needs about 40 GB, and is empty afterwards")
    parser.add_argument(
        "--checkpoint", type=Path, action="append", default=[], help="a checkpoint to build as well"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch [default: 2]")
    parser.add_argument(
        "--samples",
        type=int,
        help="calibration windows of 256 tokens [default: those of the calibration text]",
    )
    parser.add_argument("--only", nargs="*", metavar="NAME", help="cases to measure [default: all]")
    parser.add_argument("--output", type=Path, default=RECORD, help="file of the record")
    parser.add_argument("--work", help=argparse.SUPPRESS)  # one process of the benchmark
    arguments = parser.parse_args()
    if arguments.work is not None:
        print(json.dumps(work(json.loads(arguments.work))))
        return
    record: dict[str, Any] = {
        "kvexport": kvexport.__version__,
        "machine": machine(arguments.threads),
        "cases": {},
    }
    if arguments.output.exists() and arguments.only is not None:
        record["cases"] = json.loads(arguments.output.read_text(encoding="utf-8"))["cases"]
    for case in cases(arguments):
        if arguments.only is None or case.name in arguments.only:
            record["cases"][case.name] = measure(arguments, case)
            record["cost_per_layer"] = cost_per_layer(record["cases"])
            arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            say(case.name, record["cases"][case.name])
    print(json.dumps(record["cost_per_layer"], indent=1))


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """All models, in the order in which they are built."""
    random = arguments.folder / "random"
    for layers in LAYERS:
        yield Case(f"llama-{layers}", random, {"layers": layers, **SHAPE})
    yield Case("llama-1.1b", random, LARGE, RATIOS[:1])
    for checkpoint in arguments.checkpoint:
        yield Case(checkpoint.name, checkpoint)
    int4 = {"weights": "int4", "weight_method": "nearest"}
    yield Case("llama-8b-int4", random, LLAMA_8B, (1.0,), int4, samples=16, compares=False)


def measure(arguments: argparse.Namespace, case: Case) -> dict[str, Any]:
    """Build one model at every ratio."""
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    parameters = None if case.shape is None else write_checkpoint(case.source, **case.shape)
    calibration = "random" if case.shape else DEFAULT
    common = {
        "checkpoint": str(case.source),
        "samples": recipe_for(calibration, case.samples or arguments.samples).samples,
        "calibration": calibration,
        "cache": str(folder / "cache"),
        "bundle": str(folder / "bundle"),
        "threads": arguments.threads,
        "options": case.options,
    }
    try:
        forwards, builds = [], {}
        for ratio in case.ratios:
            if case.compares:
                forwards.append(in_process(common | {"job": "forward"}))
            builds[f"{ratio:g}"] = in_process(common | {"job": "build", "ratio": ratio})
    finally:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        if case.shape is not None:
            shutil.rmtree(case.source)
    for build in builds.values() if case.compares else ():
        for clock in ("seconds", "processor_seconds"):
            passed = statistics.median(each[clock] for each in forwards)
            build[f"forward_passes_by_{clock}"] = round(build[clock] / passed, 2)
    return {
        "shape": case.shape,
        "options": case.options,
        "parameters": parameters,
        "forward_passes": forwards,
        "builds": builds,
    }


def cost_per_layer(cases: dict[str, Any]) -> dict[str, float]:
    """Processor seconds that a layer adds to the first build, between measured numbers of layers."""
    seconds = {
        layers: cases[f"llama-{layers}"]["builds"][f"{RATIOS[0]:g}"]["processor_seconds"]
        for layers in LAYERS
        if f"llama-{layers}" in cases
    }
    pairs = zip(list(seconds), list(seconds)[1:], strict=False)
    return {
        f"{fewer} to {more} layers": round((seconds[more] - seconds[fewer]) / (more - fewer), 3)
        for fewer, more in pairs
    }


def in_process(task: dict[str, Any]) -> dict[str, Any]:
    """Run one task of `work` in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(task["threads"]), "KVEXPORT_CACHE": task["cache"]}
    command = [sys.executable, __file__, "FOLDER", "--work", json.dumps(task)]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment).stdout
    result: dict[str, Any] = json.loads(output)
    return result


def work(task: dict[str, Any]) -> dict[str, Any]:
    """One task, in this process."""
    import torch

    torch.set_num_threads(task["threads"])
    return build(task) if task["job"] == "build" else forward(task)


def build(task: dict[str, Any]) -> dict[str, Any]:
    """Build a bundle as the command line does; seconds and peak resident bytes, by stage and in all."""
    from kvexport.build import build as build_bundle
    from kvexport.cli.conversion import build_options

    unset = dict.fromkeys(("length", "seed", "statistics", "kv_heads", "heal", "heal_lora"))
    options = build_options(
        unset
        | {
            "kv_ratio": task["ratio"],
            "calibration": task["calibration"],
            "samples": task["samples"],
            "dtype": "float16",
            "no_cache": False,
        }
        | task["options"]
    )
    meter = MemoryMeter()
    start, processor_start = time.perf_counter(), time.process_time()
    with meter.running():
        report = build_bundle(Path(task["checkpoint"]), Path(task["bundle"]), options, meter, force=True)
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
    bundle_bytes = sum(file.stat().st_size for file in Path(task["bundle"]).rglob("*") if file.is_file())
    shutil.rmtree(task["bundle"])
    return {
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor_seconds, 1),
        "seconds_by_stage": report.seconds,
        "peak_resident_bytes": max(meter.peaks.values()),
        "peak_resident_bytes_by_stage": meter.peaks,
        "bundle_bytes": bundle_bytes,
        "kl_on_held_out_calibration_text": report.divergence and report.divergence.mean_kl,
    }


class MemoryMeter(Progress):
    """Samples the resident memory of this process while stages run.

    Attributes:
        peaks: largest resident memory of each stage in bytes, by its name, and `between stages`.
    """

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._stage = "between stages"

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        outer, self._stage = self._stage, name
        yield
        self._stage = outer

    @contextmanager
    def running(self) -> Iterator[None]:
        """Sample until the block ends."""
        process, ended = psutil.Process(), threading.Event()

        def sample() -> None:
            while not ended.wait(_SAMPLING_SECONDS):
                stage = self._stage
                self.peaks[stage] = max(self.peaks.get(stage, 0), process.memory_info().rss)

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def forward(task: dict[str, Any]) -> dict[str, Any]:
    """One forward pass of transformers in float32 with all logits, over random tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(task["checkpoint"], dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (task["samples"], 256), generator=generator)
    with torch.inference_mode():
        model(tokens[:1])
        start, processor_start = time.perf_counter(), time.process_time()
        for batch in tokens.split(_BATCH):
            model(batch, use_cache=False)
        seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
    return {
        "seconds": round(seconds, 2),
        "processor_seconds": round(processor_seconds, 2),
        "tokens": tokens.numel(),
    }


def machine(threads: int) -> str:
    python = f"Python {platform.python_version()}"
    return f"{platform.machine()}, {python}, {threads} threads of {os.cpu_count()} processors"


def say(name: str, case: dict[str, Any]) -> None:
    for ratio, each in case["builds"].items():
        peak = each["peak_resident_bytes"] / 1e9
        passes = each.get("forward_passes_by_seconds", "no")
        print(f"{name} at {ratio}: {each['seconds']} s, {passes} forward passes, {peak:.2f} GB")


if __name__ == "__main__":
    main()
