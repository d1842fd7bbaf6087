"""Fuzzing of the C++ parsers: writes seeds from tiny bundles, runs libFuzzer, and reads its statistics.

Run: python tests/cpp/fuzzing.py SECONDS RECORD [FUZZER...] (with `tests` on PYTHONPATH): runs each for
SECONDS and writes a benchmark record.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import builds
import reader_files
import torch
from support.decoders import make_decoder
from support.tiny_bundles import byte_level_tokenizer, write_bundle

from kvexport.build.text_files import write_text_files
from kvexport.progress import Progress

FUZZERS = ("manifest", "safetensors", "text", "self_test", "engine_record")
_DONE = re.compile(r"#(\d+)\s+DONE\s+cov: (\d+) ft: (\d+) corp: (\d+)/")
_CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_seeds(folder: Path) -> None:
    """Write a corpus for each fuzzer, in a directory with its name."""
    for name in FUZZERS:
        (folder / name).mkdir(parents=True)
    made = folder / "made"
    made.mkdir()
    reader_files.write(made)
    decoder = make_decoder("gqa", dtype=torch.float32)
    tested = write_bundle(made / "tested", decoder, self_test=True)
    shutil.copy(tested / "self_test.json", folder / "self_test" / "sound")
    for name in ("tiny", "evicting", "windowed"):
        shutil.copy(made / name / "manifest.json", folder / "manifest" / name)
    shutil.copy(made / "sound.safetensors", folder / "safetensors" / "sound")
    shutil.copy(made / "engines.json", folder / "engine_record" / "sound")
    checkpoint = made / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "tokenizer.json").write_text(byte_level_tokenizer(), encoding="utf-8")
    for name, config in {"plain": {}, "chat": {"chat_template": _CHAT}}.items():
        text = made / name
        text.mkdir()
        shutil.copy(checkpoint / "tokenizer.json", text)
        (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
        write_text_files(
            checkpoint, text, capacity=64, vocab_size=320, bos=None, eos=(0,), progress=Progress()
        )
        shutil.copy(text / "text.json", folder / "text" / name)
    shutil.rmtree(made)


def fuzz(name: str, seconds: int, corpus: Path, *, seed: int = 1) -> dict[str, Any]:
    """Run one fuzzer on its corpus, to which it adds inputs.

    Raises:
        AssertionError: an input ends the program; the message has it in hexadecimal.
    """
    program = builds.build("fuzz") / "fuzz" / f"fuzz_{name}"
    with tempfile.TemporaryDirectory() as found:
        options = {
            "max_total_time": seconds,
            "max_len": 1 << 16,
            "rss_limit_mb": 2048,
            "timeout": 10,
            "seed": seed,
            "dict": builds.CPP / "fuzz" / "bundle.dict",
            "artifact_prefix": f"{found}/",
            "print_final_stats": 1,
        }
        ran = subprocess.run(
            [str(program), *(f"-{key}={value}" for key, value in options.items()), str(corpus)],
            capture_output=True,
            text=True,
            errors="replace",
            env=builds.environment(),
        )
        crashes = {file.name: file.read_bytes().hex() for file in Path(found).iterdir()}
    assert ran.returncode == 0 and not crashes, f"{name}: {crashes}\n{ran.stderr[-5000:]}"
    done = _DONE.search(ran.stderr)
    assert done is not None, ran.stderr[-2000:]
    executions, edges, features, corpus_size = map(int, done.groups())
    return {
        "fuzzer": name,
        "seconds": seconds,
        "executions": executions,
        "coverage_edges": edges,
        "features": features,
        "corpus": corpus_size,
        "crashes": len(crashes),
    }


def main(seconds: int, record: Path, names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        corpora = Path(folder) / "corpora"
        write_seeds(corpora)
        runs = [fuzz(name, seconds, corpora / name) for name in names or FUZZERS]
    compiler = builds.require("clang++", "--version").splitlines()[0]
    described = {
        "what": "libFuzzer on the parsers of the C++ library, with AddressSanitizer and "
        "UndefinedBehaviorSanitizer",
        "compiler": compiler,
        "machine": platform.machine(),
        "runs": runs,
    }
    record.write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
