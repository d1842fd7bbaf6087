"""Compare decode and prefill on the CPU with onnxruntime-genai and transformers, on the same weights.

A llama of 12 layers, hidden size 1024, 16 heads of 64, random float32 weights, and the same model with a
quarter of its KV heads, made by `kvexport compress --method mean-pool`, so that every side runs the same
weights:
  kvexport      16 and 4 KV heads; a step is `Session.step` and the argmax
  genai         onnxruntime-genai's own builds of both checkpoints; a step is `generate_next_token`, greedy
  transformers  16 KV heads with a static cache that is made for each measurement, no larger than needed,
                since every step reads all of it; a step is a call of the model and the argmax
All sides run in one process and alternate: prefills one by one, steps in rounds of six. The first two steps
of a round are not counted, since the threads of the previous side keep spinning for a moment. Before the
measurement all sides must agree on the next tokens of a short prompt. Requires onnxruntime-genai, which no
extra of kvexport installs: pip install onnxruntime-genai==0.18.0. Times and ratios with their targets go to
benchmarks/results/decode_cpu.json, a table to decode_cpu.md.

    python benchmarks/decode_cpu.py
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from alternating import Prefill, Step, alternate, figures_table, parser_for, room_for, target, version
from records import save

import kvexport

DEPTHS, PROMPTS = (512, 8192), (512, 4096)
SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 2048,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIDES = (
    "kvexport, 16 KV heads",
    "genai, 16 KV heads",
    "kvexport, 4 KV heads",
    "genai, 4 KV heads",
    "transformers, 16 KV heads",
)
# stage, tokens, who, whom, and how many times as fast at least
TARGETS = (
    *(("decode", depth, SIDES[0], SIDES[1], 1.0) for depth in DEPTHS),
    ("decode", 8192, SIDES[2], SIDES[3], 1.6),
    ("decode", 8192, SIDES[2], SIDES[1], 2.0),
    *(("decode", depth, SIDES[0], SIDES[4], 1.0) for depth in DEPTHS),
    *(("prefill", prompt, SIDES[0], SIDES[4], 1.0) for prompt in PROMPTS),
    *(("prefill", prompt, *pair, 0.9) for prompt in PROMPTS for pair in (SIDES[:2], SIDES[2:4])),
)

PACKAGES = ("onnxruntime", "onnxruntime-genai", "torch", "transformers")  # whose versions are recorded


def main() -> None:
    parser = parser_for(__doc__, steps=40, repetitions=3)
    parser.add_argument(
        "--layers",
        type=int,
        default=SHAPE["num_hidden_layers"],
        help="layers of the model; fewer to try the script",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        make_models(work, arguments.layers)
        record = measure(work, arguments.threads, arguments.steps, arguments.repetitions)
    record["layers"] = arguments.layers
    record["targets"] = [target(record, *each) for each in TARGETS]
    text = table(record)
    save(record, arguments.output / "decode_cpu", text, {})
    print(text)


def make_models(work: Path, layers: int) -> None:
    """Both checkpoints, our bundles of them and genai's builds, where they are not there yet."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def run(*command: str | Path) -> None:
        subprocess.run(
            [sys.executable, "-m", *map(str, command)],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    work.mkdir(exist_ok=True)
    whole, quarter = work / "checkpoint-16", work / "checkpoint-4"
    if not whole.exists():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": layers})).save_pretrained(whole)
        tokenizer(whole)
    sample = ("--calibration", "random", "--samples", "4", "--length", "32")
    if not quarter.exists():
        run("kvexport", "compress", whole, "-o", quarter, "--kv-heads", "4", "--method", "mean-pool", *sample)
        tokenizer(quarter)
    for heads, checkpoint in ((16, whole), (4, quarter)):
        if not (work / f"kvexport-{heads}").exists():
            run(
                "kvexport",
                "build",
                checkpoint,
                "-o",
                work / f"kvexport-{heads}",
                "--kv-ratio",
                "1",
                "--capacity",
                str(SHAPE["max_position_embeddings"]),
                *sample,
            )
        genai = f"genai, {heads} KV heads" in SIDES
        if genai and not (work / f"genai-{heads}").exists():
            out = work / f"genai-{heads}"
            run("onnxruntime_genai.models.builder", "-i", checkpoint, "-o", out, "-p", "fp32", "-e", "cpu")


def tokenizer(checkpoint: Path) -> None:
    """genai's builder wants a tokenizer; no text is made or read."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"<{index}>": index for index in range(SHAPE["vocab_size"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<0>", bos_token="<1>", eos_token="<2>"
    ).save_pretrained(checkpoint)


def open_side(side: str, work: Path, threads: int, more: int) -> tuple[Prefill, Step]:
    """A side's prefill, which begins anew with room for `more` tokens after the prompt, and its step."""
    name, heads = side.split(", ")[0], side.split(", ")[1].split()[0]
    if name == "kvexport":
        return open_kvexport(work / f"kvexport-{heads}", threads)
    if name == "genai":
        return open_genai(work / f"genai-{heads}", threads, more)
    return open_transformers(work / f"checkpoint-{heads}", threads, more)


def open_kvexport(path: Path, threads: int) -> tuple[Prefill, Step]:
    session = kvexport.open(path, provider="cpu", threads=threads)
    last = [0]

    def prefill(ids: list[int]) -> int:
        last[0] = int(session.prefill(ids)[0].argmax())
        return last[0]

    def step() -> int:
        last[0] = int(session.step(last)[0].argmax())
        return last[0]

    return prefill, step


def open_genai(path: Path, threads: int, more: int) -> tuple[Prefill, Step]:
    import onnxruntime_genai as genai

    config_path = path / "genai_config.json"
    config = json.loads(config_path.read_text())
    config["model"]["decoder"]["session_options"] |= {
        "intra_op_num_threads": threads,
        "inter_op_num_threads": 1,
    }
    config_path.write_text(json.dumps(config))
    model = genai.Model(str(path))
    current: list[Any] = []

    def prefill(ids: list[int]) -> int:
        current.clear()  # one cache at a time
        options, room = genai.GeneratorParams(model), len(ids) + more
        # its cache has a fixed capacity, which it shares between past and present, as ours
        options.set_search_options(
            do_sample=False, max_length=room, min_length=room - 1, past_present_share_buffer=True
        )
        current.append(genai.Generator(model, options))
        current[0].append_tokens(ids)
        return int(np.asarray(current[0].get_logits())[0, -1].argmax())

    def step() -> int:
        current[0].generate_next_token()
        return int(current[0].get_next_tokens()[0])

    return prefill, step


def open_transformers(path: Path, threads: int, more: int) -> tuple[Prefill, Step]:
    import torch
    from transformers import LlamaForCausalLM, StaticCache

    torch.set_num_threads(threads)
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    state: dict[str, Any] = {}

    @torch.inference_mode()
    def call(ids: list[int]) -> int:
        positions = torch.arange(state["length"], state["length"] + len(ids))
        logits = model(
            torch.tensor([ids]),
            past_key_values=state["cache"],
            cache_position=positions,
            position_ids=positions[None],
            logits_to_keep=1,
        ).logits
        state["length"] += len(ids)
        state["last"] = int(logits[0, -1].argmax())
        return state["last"]

    def prefill(ids: list[int]) -> int:
        state.clear()
        state.update(cache=StaticCache(config=model.config, max_cache_len=len(ids) + more), length=0)
        return call(ids)

    return prefill, lambda: call([state["last"]])


def measure(work: Path, threads: int, steps: int, repetitions: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    ids = random.integers(3, SHAPE["vocab_size"], max(*DEPTHS, *PROMPTS)).tolist()
    more = room_for(steps)
    sides = {side: open_side(side, work, threads, more) for side in SIDES}
    agree(sides, ids)
    return {
        "kvexport": kvexport.__version__,
        "machine": f"{platform.machine()}, {threads} threads",
        "versions": {name: version(name) for name in PACKAGES},
        "shape": SHAPE,
        **alternate(sides, ids, PROMPTS, DEPTHS, steps, repetitions),
    }


def agree(sides: dict[str, tuple[Prefill, Step]], ids: list[int]) -> None:
    """All sides of one checkpoint must find the same likeliest tokens."""
    for heads in ("16", "4"):
        found = {}
        for side, (prefill, step) in sides.items():
            if f", {heads} KV" in side:
                found[side] = [prefill(ids[:40]), *(step() for _ in range(4))]
                if side.startswith("genai"):  # its first step gives the token that the prompt's logits chose
                    found[side] = [*found[side][1:]]
        shortest = min(map(len, found.values()))
        if len({tuple(tokens[:shortest]) for tokens in found.values()}) != 1:
            raise SystemExit(f"the sides do not run the same model: {found}")


def table(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {each}" for name, each in record["versions"].items())
    text = (
        f"# Decode and prefill on the CPU\n\n`benchmarks/decode_cpu.py`, kvexport {record['kvexport']}, "
        f"{versions}; "
        f"{record['machine']}, float32, {record['layers']} layers. Medians of alternating calls in "
        "milliseconds, quartiles in "
        "brackets; raw times in decode_cpu.json. Not measured: more threads, other processors, lower "
        "precision.\n\n"
    )
    return text + figures_table(record, SIDES)


if __name__ == "__main__":
    main()
