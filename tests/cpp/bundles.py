"""Tiny bundles for tests of the C++ library; cpp/tests reads them from KVEXPORT_TEST_BUNDLES.

Run: python tests/cpp/bundles.py FOLDER (with `tests` on PYTHONPATH).
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from support.decoders import make_decoder
from support.quantized_decoders import quantize_decoder
from support.tiny_bundles import write_bundle

from kvexport.eviction.config import POLICIES, Eviction

VOCAB, CAPACITY = 40, 600  # three growth steps of a cache
BUDGET = Eviction("l2-norm", 24, protect_first=2, protect_recent=5)
LARGE = Eviction("window", 300, protect_first=4)  # more than one growth step of a cache
STYLES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "bloom": {},
    "qwen3": {"kv_heads": 2},
    "window": {"window": 9},
}
EVICTING = {f"gqa-{policy}": dataclasses.replace(BUDGET, policy=policy) for policy in POLICIES} | {
    "gqa-mixed": dataclasses.replace(BUDGET, skip_layers=(0,)),
    "gqa-large": LARGE,
    "bloom-evicting": BUDGET,
    "qwen3-evicting": BUDGET,
    "window-evicting": BUDGET,
}
HALF = {"gqa-float16": None, "gqa-float16-evicting": BUDGET}
QUANTIZED = ("gqa-int4", "gqa-int8", "bloom-int4")  # bloom is tied
NAMES = (*STYLES, *EVICTING, *HALF, *QUANTIZED)


def write_bundles(folder: Path) -> None:
    """Write all of `NAMES`, and `gqa-bfloat16`: two layers, 40 tokens, float32 by default."""
    folder.mkdir(exist_ok=True)
    for name in (*NAMES, "gqa-bfloat16"):
        style, _, kind = name.partition("-")
        sizes = {"hidden": 64, "head_dim": 16} if name in QUANTIZED else {}
        decoder = make_decoder(style, dtype=torch.float32, max_positions=1024, **sizes, **STYLES[style])
        if name in QUANTIZED:
            decoder = quantize_decoder(decoder, kind)
        dtype = kind.partition("-")[0] if "float16" in kind else "float32"
        write_bundle(
            folder / name,
            decoder,
            dtype=dtype,
            capacity=CAPACITY,
            eviction=EVICTING.get(name) or HALF.get(name),
        )


if __name__ == "__main__":
    write_bundles(Path(sys.argv[1]).resolve())
