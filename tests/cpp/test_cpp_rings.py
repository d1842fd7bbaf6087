"""Layers with a sliding window in C++: rings of the window and one call, and the results of Python.

The prompts are longer than three times the ring. Index arithmetic and damaged files are tested in
cpp/tests/test_rings.cpp, engines on a simulated GPU in cpp/tests/gpu.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from drive import Drive, data_of
from support.decoders import make_decoder
from support.tiny_bundles import exact_logits, write_bundle

from kvexport.eviction.config import Eviction
from kvexport.model.decoder import Decoder
from kvexport.model.loader import load_decoder
from kvexport.runtime import open_bundle

pytestmark = pytest.mark.slow
Built = Callable[[str], Path]

WINDOW, CHUNK, CAPACITY, VOCAB = 7, 16, 400, 40
RING = WINDOW + CHUNK
PROMPT = 3 * RING + 41
NAMES = ("mistral", "float16", "alibi", "mixed", "evicting")


def mixed_windows() -> Decoder:
    """A decoder with full attention in the middle of three layers, and two different windows."""
    decoder = make_decoder("window", layers=3, window=WINDOW, dtype=torch.float32, max_positions=1024)
    windows = (WINDOW, None, 3)
    layers = [
        dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, window=window))
        for layer, window in zip(decoder.layers, windows, strict=True)
    ]
    return dataclasses.replace(decoder, layers=layers)


@pytest.fixture(scope="module")
def decoders(tiny_checkpoint: Callable[..., Path]) -> dict[str, Decoder]:
    mistral = load_decoder(tiny_checkpoint("mistral", sliding_window=WINDOW, vocab_size=VOCAB))
    alibi = make_decoder("bloom", window=WINDOW, dtype=torch.float32, max_positions=None)
    mixed = mixed_windows()
    return {"mistral": mistral, "float16": mistral, "alibi": alibi, "mixed": mixed, "evicting": mixed}


@pytest.fixture(scope="module")
def windowed(decoders: dict[str, Decoder], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One bundle for each of `NAMES`. Of `evicting`, layer 1 evicts and the others are rings."""
    folder = tmp_path_factory.mktemp("windowed")
    for name, decoder in decoders.items():
        write_bundle(
            folder / name,
            decoder,
            dtype="float16" if name == "float16" else "float32",
            capacity=CAPACITY,
            eviction=Eviction("window", 100, skip_layers=(0, 2)) if name == "evicting" else None,
            self_test=True,
        )
    return folder


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCAB, count)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [1, CHUNK, 1000])
def test_tokens_equal_those_of_python(name: str, chunk: int, drive: Drive, windowed: Path) -> None:
    drive.open(windowed / name, chunk=chunk)
    drive.new()
    with open_bundle(windowed / name, provider="cpu", threads=1, chunk=chunk) as session:
        cache = session.new_cache()
        for turn, count in enumerate((PROMPT, 1, 0, RING + 2)):
            prompt = tokens(count, turn)
            made = session.generate(prompt, max_new_tokens=30, stop=[], cache=cache)
            result = drive.generate(prompt, max_new_tokens=30, stop_tokens=[])
            assert result["tokens"] == list(made.token_ids) and len(made.token_ids) == 30, (name, turn)
        assert drive("cache", cache="c")["length"] == cache.lengths[0]


@pytest.mark.parametrize("name", ["mistral", "alibi", "mixed"])
def test_logits_equal_the_reference(
    name: str, drive: Drive, windowed: Path, decoders: dict[str, Decoder]
) -> None:
    text = tokens(PROMPT + 60, 3)
    exact = exact_logits(decoders[name], text)
    drive.open(windowed / name, chunk=CHUNK)
    drive.new()
    rows = [drive.prefill(text[:PROMPT])] + [drive.step(token) for token in text[PROMPT:]]
    np.testing.assert_allclose(rows, exact[PROMPT - 1 :], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_saved_caches_are_restored_after_a_wrap(
    name: str, drive: Drive, windowed: Path, tmp_path: Path
) -> None:
    """By C++ and by Python, from either, into rings of another size."""
    prompt, following = tokens(PROMPT), tokens(RING, 5)
    drive.open(windowed / name, chunk=CHUNK)
    drive.open(windowed / name, "other", chunk=5)
    drive.new()
    with open_bundle(windowed / name, provider="cpu", threads=1, chunk=CHUNK) as session:
        cache = session.new_cache()
        session.generate(prompt, max_new_tokens=3, stop=[], cache=cache)
        drive.generate(prompt, max_new_tokens=3, stop_tokens=[])
        cache.save(tmp_path / "by_python")
        drive("save", cache="c", file=str(tmp_path / "by_cpp"))
        assert data_of(tmp_path / "by_python") == data_of(tmp_path / "by_cpp")
        expected = session.generate(following, max_new_tokens=30, stop=[], cache=cache)
        by_cpp = session.load(tmp_path / "by_cpp")
        restored = session.generate(following, max_new_tokens=30, stop=[], cache=by_cpp)
        assert restored.token_ids == expected.token_ids
    for session_name in ("s", "other"):
        for file in ("by_python", "by_cpp"):
            drive("load", session=session_name, cache="d", file=str(tmp_path / file))
            drive("save", cache="d", file=str(tmp_path / "again"))
            assert data_of(tmp_path / "again") == data_of(tmp_path / "by_cpp")
            result = drive.generate(following, max_new_tokens=30, stop_tokens=[], cache="d")
            assert result["tokens"] == list(expected.token_ids), (session_name, file)


def test_caches_hold_the_window_and_one_call(drive: Drive, windowed: Path) -> None:
    manifest = json.loads((windowed / "mixed" / "manifest.json").read_text())
    per_slot = [
        4 * layer["num_key_value_heads"] * (layer["key_head_dim"] + layer["value_head_dim"])
        for layer in manifest["layers"]
    ]
    aligned = 256 * 2 * len(per_slot)  # buffers are aligned to 256 bytes
    for chunk, capacity in ((CHUNK, CAPACITY), (CHUNK, 0), (5, 200), (CHUNK, 20)):
        drive.open(windowed / "mixed", chunk=chunk)
        size = drive.new(capacity=capacity)["bytes"]
        most = capacity or CAPACITY
        slots = (min(most, WINDOW + chunk), most, min(most, 3 + chunk))
        expected = sum(count * each for count, each in zip(slots, per_slot, strict=True))
        assert expected <= size < expected + aligned
        assert drive("memory", session="s", capacity=capacity) == size
        drive.generate(tokens(min(most - 10, PROMPT)), max_new_tokens=500, stop_tokens=[])
        assert drive("cache", cache="c") == {"length": most, "capacity": most, "bytes": size}


@pytest.mark.parametrize("name", NAMES)
def test_self_test_passes(name: str, built: Built, windowed: Path) -> None:
    ran = subprocess.run(
        [built("release") / "kvexport_self_test", windowed / name, "--provider", "cpu", "--json"],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert json.loads(ran.stdout)["verdict"] == "ok"
