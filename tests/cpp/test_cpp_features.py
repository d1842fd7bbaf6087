"""Every feature of the neutral decoder in C++: tokens and logits equal Python's, and the self-test passes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drive import Drive
from support.blocks import BLOCKS, windowed
from support.graph_decoders import VOCAB
from support.tiny_bundles import write_bundle

from kvexport.runtime import open_bundle

pytestmark = pytest.mark.slow
Built = Callable[[str], Path]

CHUNK, PROMPT, STEPS = 8, 21, 30
# `make test` runs these in float32 with all of the context, and in float16 with windows.
FEW = (
    "all-norms",
    "parallel-two-norms",
    "qk-norm-over-heads",
    "clip",
    "softcap",
    "two-ropes",
    "learned-positions",
    "alibi-and-softcap",
)


def cases() -> list[Any]:
    """Names and dtypes."""
    return [
        pytest.param(name, dtype, marks=[] if name in FEW else [pytest.mark.exhaustive])
        for name in BLOCKS
        for dtype in ("float32", "float16")
    ]


@pytest.mark.parametrize(("name", "dtype"), cases())
def test_cpp_equals_python_and_passes_the_self_test(
    name: str, dtype: str, drive: Drive, built: Built, tmp_path: Path
) -> None:
    decoder = BLOCKS[name] if dtype == "float32" else windowed(BLOCKS[name])
    bundle = write_bundle(tmp_path / "bundle", decoder, dtype=dtype, self_test=True)
    prompt = np.random.default_rng(0).integers(0, VOCAB, PROMPT).tolist()
    drive.open(bundle, chunk=CHUNK)
    with open_bundle(bundle, provider="cpu", threads=1, chunk=CHUNK) as session:
        cache = session.new_cache()
        drive.new()
        assert (drive.prefill(prompt) == session.prefill(prompt, cache=cache)[0]).all()
        assert (drive.step(7) == session.step([7], cache=cache)[0]).all()
        made = session.generate(prompt, max_new_tokens=STEPS, stop=[])
    drive.new()
    result = drive.generate(prompt, max_new_tokens=STEPS, stop_tokens=[])
    assert result["tokens"] == list(made.token_ids) and len(made.token_ids) == STEPS
    program = built("release") / "kvexport_self_test"
    ran = subprocess.run([program, bundle, "--provider", "cpu", "--json"], capture_output=True, text=True)
    assert ran.returncode == 0 and json.loads(ran.stdout)["verdict"] == "ok", ran.stdout + ran.stderr
