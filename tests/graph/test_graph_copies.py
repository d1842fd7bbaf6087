"""Copies of a graph in memory: added taps, float32 arithmetic, the bundle unchanged."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from support.graph_decoders import (
    BLOOM,
    VOCAB,
    Caller,
    Shape,
    disagreement,
    make_decoder,
    open_session,
    quiet,
    rounded,
    slopes_of,
    write,
)

from kvexport.graph import DATA_FILE, GRAPH_FILE, as_float32, attention_tap, residual_tap, with_taps

DECODER = make_decoder([Shape(kv_heads=2), Shape()])


def test_taps_follow_the_outputs_and_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contract = write(DECODER, tmp_path / "bundle")
    before = {path.name: path.read_bytes() for path in (tmp_path / "bundle").iterdir()}
    monkeypatch.chdir(tmp_path)
    session = with_taps(Path("bundle") / GRAPH_FILE).session(quiet())  # a relative path, from another folder
    names = [output.name for output in session.get_outputs()]
    taps = [name for layer in (0, 1) for name in (attention_tap(layer), residual_tap(layer))]
    assert names == [spec.name for spec in contract.outputs] + taps
    ids = torch.randint(0, VOCAB, (2, 5))
    tapped, untapped = (
        Caller(which, contract, 2, 8)(ids, [0, 0]) for which in (session, open_session(tmp_path / "bundle"))
    )
    np.testing.assert_array_equal(tapped["logits"], untapped["logits"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "bundle").iterdir()} == before


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float32_copy_needs_no_file_and_lives_as_long_as_its_session(dtype: str, tmp_path: Path) -> None:
    contract = write(DECODER, tmp_path, dtype)
    session = as_float32(tmp_path / GRAPH_FILE).session(quiet())
    for path in tmp_path.iterdir():
        path.unlink()
    gc.collect()
    trash = [np.full((size, 24), np.nan, dtype=np.float32) for size in range(200)]  # overwrites freed weights
    assert disagreement(rounded(DECODER, getattr(torch, dtype)), session, contract) < 1e-2
    assert len(trash) == 200


def test_float32_copy_of_alibi_is_exact_on_the_rounded_weights(tmp_path: Path) -> None:
    decoder = make_decoder([Shape(slopes=slopes_of(4))] * 2, BLOOM)
    contract = write(decoder, tmp_path, "float16")
    copy = as_float32(tmp_path / GRAPH_FILE, taps=True)
    assert disagreement(rounded(decoder, torch.float16), copy.session(quiet()), contract) < 5e-6
    assert (
        disagreement(decoder, copy.session(quiet()), contract) > 5e-5
    )  # the comparison detects the rounding


def test_float32_graph_is_copied_unchanged(tmp_path: Path) -> None:
    contract = write(DECODER, tmp_path)
    copy = as_float32(tmp_path / GRAPH_FILE, taps=True)
    assert not copy.weights and copy.model == with_taps(tmp_path / GRAPH_FILE).model
    assert disagreement(DECODER, copy.session(quiet()), contract) < 5e-6


def test_a_damaged_data_file_changes_the_float32_copy(tmp_path: Path) -> None:
    contract = write(DECODER, tmp_path, "bfloat16")
    data = bytearray((tmp_path / DATA_FILE).read_bytes())
    data[-200:] = bytes(200)  # the last rows of the head
    (tmp_path / DATA_FILE).write_bytes(data)
    session = as_float32(tmp_path / GRAPH_FILE).session(quiet())
    assert disagreement(rounded(DECODER, torch.bfloat16), session, contract) > 5e-2
