"""The reviewed text of each family's graph.

KVEXPORT_UPDATE_GOLDEN=1 pytest tests/graph/test_graph_golden.py writes the files again.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from support.graph_decoders import BLOOM, LLAMA, QWEN2, Shape, make_decoder, slopes_of, write

from kvexport.graph import GRAPH_FILE, render

GOLDEN = Path(__file__).resolve().parent / "golden"
FAMILIES = {
    "llama": (make_decoder([Shape(kv_heads=2)] * 2), "float32"),
    "mistral": (make_decoder([Shape(kv_heads=2, window=16)] * 2), "float16"),
    "bloom": (make_decoder([Shape(slopes=slopes_of(4))] * 2, BLOOM), "float16"),
    "qwen2": (make_decoder([Shape(kv_heads=2)] * 2, QWEN2), "bfloat16"),
    "qwen3": (
        make_decoder([Shape(kv_heads=2, qk_norm=True)] * 2, dataclasses.replace(LLAMA, tied=True)),
        "float32",
    ),
    "llama_online": (
        make_decoder(
            [
                Shape(kv_heads=1, group=4, key_dim=16, value_dim=16, value_map=True),
                Shape(kv_heads=2, group=2, key_dim=8, value_dim=8),
            ]
        ),
        "float32",
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_graph_equals_the_reviewed_text(name: str, tmp_path: Path) -> None:
    decoder, dtype = FAMILIES[name]
    write(decoder, tmp_path, dtype)
    text, golden = render(tmp_path / GRAPH_FILE), GOLDEN / f"{name}.txt"
    if os.environ.get("KVEXPORT_UPDATE_GOLDEN"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")
