"""Compare decode and prefill on the CPU with 4-bit weights, beside onnxruntime-genai and llama.cpp.

One checkpoint on every side, with a float cache of its whole context:
  kvexport           int4 in blocks as `kvexport build --weights int4` chooses them, all KV heads
  kvexport, half     the same with half of the cache
  onnxruntime-genai  its own int4 build of the checkpoint: blocks of 32
  llama.cpp          a GGUF of the checkpoint, as --gguf gives it; its cache is float16
Weights are rounded to nearest, which takes the same time as better ones. All sides run in one process and
alternate, as in decode_cpu.py. Before the measurement every side with the whole cache must continue a series
of words. With one thread, times are processor times of that thread, which other load on the machine changes
least; with more, they are elapsed times. Requires onnxruntime-genai and llama-cpp-python, which no extra of
kvexport installs.
Times and ratios with their targets go to benchmarks/results/decode_int4-THREADS.json, a table to
decode_int4-THREADS.md.

    python benchmarks/decode_int4.py CHECKPOINT --gguf FILE
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from alternating import Prefill, Step, alternate, figures_table, parser_for, room_for, target, version
from decode_cpu import open_genai, open_kvexport
from records import save

import kvexport
from kvexport.runtime.tokenizer import read_tokenizer

DEPTHS, PROMPTS = (16, 512, 2048), (512,)
SIDES = ("kvexport", "kvexport, half", "onnxruntime-genai", "llama.cpp")
# stage, tokens, who, whom, and how many times as fast at least
TARGETS = tuple(
    (stage, tokens, "kvexport", whom, least)
    for stage, tokens, least in (
        ("decode", 16, 1.0),
        ("decode", 512, 1.0),
        ("decode", 2048, 1.3),
        ("prefill", 512, 1.5),
    )
    for whom in SIDES[2:]
)
PACKAGES = ("onnxruntime", "onnxruntime-genai", "llama_cpp_python")  # whose versions are recorded
SERIES, NEXT = " red green blue" * 5 + " red green", " blue"


def main() -> None:
    parser = parser_for(__doc__, steps=60, repetitions=5)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--gguf", type=Path, help="the checkpoint in 4 bits, for llama.cpp")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        make_models(work, arguments.checkpoint)
        record = measure(work, arguments)
    record["targets"] = [target(record, *each) for each in TARGETS]
    name = f"decode_int4-{arguments.threads}"
    text = table(record, name)
    save(record, arguments.output / name, text, {})
    print(text)


def make_models(work: Path, checkpoint: Path) -> None:
    """Our bundles and genai's build, where they are not there yet."""
    work.mkdir(exist_ok=True)
    random = ("--calibration", "random", "--samples", "4", "--length", "32")
    int4 = ("--weights", "int4", "--weight-method", "nearest", "--quiet")
    for name, ratio in (("kvexport", "1"), ("kvexport-half", "0.5")):
        if name.replace("-", ", ") in SIDES and not (work / name).exists():
            run("kvexport", "build", checkpoint, "-o", work / name, "--kv-ratio", ratio, *random, *int4)
    if "onnxruntime-genai" in SIDES and not (work / "genai").exists():
        builder = ("onnxruntime_genai.models.builder", "-i", checkpoint, "-o", work / "genai")
        run(*builder, "-p", "int4", "-e", "cpu")


def run(*command: str | Path) -> None:
    """A Python module with arguments."""
    subprocess.run([sys.executable, "-m", *map(str, command)], check=True, stdout=subprocess.DEVNULL)


def open_side(side: str, work: Path, arguments: argparse.Namespace, more: int) -> tuple[Prefill, Step]:
    """A side's prefill, which begins anew with room for `more` tokens after the prompt, and its step."""
    if side.startswith("kvexport"):
        return open_kvexport(work / side.replace(", ", "-"), arguments.threads)
    if side == "onnxruntime-genai":
        return open_genai(work / "genai", arguments.threads, more)
    return open_llama_cpp(arguments.gguf, arguments.threads, max(*DEPTHS, *PROMPTS) + more)


def open_llama_cpp(gguf: Path, threads: int, room: int) -> tuple[Prefill, Step]:
    import llama_cpp

    model = llama_cpp.Llama(
        str(gguf), n_ctx=room, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    last = [0]

    def evaluate(ids: list[int]) -> int:
        model.eval(ids)
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        last[0] = int(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).argmax())
        return last[0]

    def prefill(ids: list[int]) -> int:
        model.reset()
        return evaluate(ids)

    return prefill, lambda: evaluate(last)


def measure(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    threads, more = arguments.threads, room_for(arguments.steps)
    sides = {side: open_side(side, work, arguments, more) for side in SIDES}
    continue_series(sides, work / "kvexport")
    clock = time.thread_time if threads == 1 else time.perf_counter
    vocabulary = json.loads((arguments.checkpoint / "config.json").read_text())["vocab_size"]
    ids = np.random.default_rng(0).integers(3, vocabulary, max(*DEPTHS, *PROMPTS)).tolist()
    times = alternate(sides, ids, PROMPTS, DEPTHS, arguments.steps, arguments.repetitions, clock)
    return {
        "kvexport": kvexport.__version__,
        "checkpoint": arguments.checkpoint.name,
        "gguf": None if arguments.gguf is None else arguments.gguf.name,
        "machine": f"{platform.machine()}, {threads} thread{'s' if threads > 1 else ''}",
        "times": "processor time of the thread" if threads == 1 else "elapsed time",
        "versions": {name: version(name) for name in PACKAGES},
        **times,
    }


def continue_series(sides: dict[str, tuple[Prefill, Step]], bundle: Path) -> None:
    """
    Raises:
        SystemExit: a side does not continue a repeated series of words, so that it does not run the model.
    """
    tokenizer = read_tokenizer(bundle)
    prompt, whole = tokenizer.encode(SERIES), tokenizer.encode(SERIES + NEXT)
    found = {}
    for side, (prefill, step) in sides.items():
        if side.endswith("half"):
            continue  # calibrated on random tokens
        first = prefill(prompt)
        ids = [first, *(step() for _ in range(len(whole)))]
        found[side] = tokenizer.decode(ids)
    wrong = {side: text for side, text in found.items() if NEXT.strip() not in text}
    if wrong:
        raise SystemExit(f"{SERIES!r} must be continued by {NEXT!r}, got {wrong}")


def table(record: dict[str, Any], name: str) -> str:
    versions = ", ".join(f"{package} {each}" for package, each in record["versions"].items())
    return (
        f"# Decode and prefill on the CPU with 4-bit weights\n\n`benchmarks/decode_int4.py`, "
        f"{record['checkpoint']}, kvexport {record['kvexport']}, {versions}; llama.cpp runs "
        f"{record['gguf']}; {record['machine']}. Medians of alternating calls in milliseconds of "
        f"{record['times']}, quartiles in brackets; raw times in {name}.json.\n\n"
    ) + figures_table(record, SIDES)


if __name__ == "__main__":
    main()
