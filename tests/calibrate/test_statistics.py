"""Saved statistics are restored exactly, and rejected if damaged or of another checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.decoders import make_attention, random_inputs

from kvexport.calibrate import Moments, MomentsAccumulator, Statistics, recipe_for, save_header, save_moments
from kvexport.calibrate.moments import MOMENT_NAMES
from kvexport.errors import UsageError

DIGEST = "a" * 64


def _moments(seed: int = 0) -> Moments:
    attention = make_attention("gqa", seed=seed)
    accumulator = MomentsAccumulator(attention)
    accumulator.add(random_inputs(2, 8, seed=seed))
    return accumulator.finish()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    windows = torch.arange(48).view(6, 8)
    save_header(tmp_path, DIGEST, recipe_for("self", samples=6, length=8), windows)
    for index in range(2):
        save_moments(tmp_path, index, _moments(index))
    return tmp_path


def test_round_trip_is_exact(saved: Path) -> None:
    statistics = Statistics(saved, DIGEST)
    assert torch.equal(statistics.windows, torch.arange(48).view(6, 8))
    assert statistics.windows.dtype == torch.int64
    assert statistics.header["recipe"] == recipe_for("self", samples=6, length=8).to_json()
    for index in range(2):
        restored, original = statistics.moments(index), _moments(index)
        for name in MOMENT_NAMES:
            assert torch.equal(getattr(restored, name), getattr(original, name))
            assert getattr(restored, name).dtype == getattr(original, name).dtype


def test_header_contains_no_path(saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "corpus.txt"
    file.parent.mkdir()
    file.write_text("text")
    save_header(saved, DIGEST, recipe_for(str(file)), torch.zeros(1, 2, dtype=torch.int64))
    assert "deep" not in (saved / "statistics.json").read_text()


def test_rejects_statistics_of_another_checkpoint(saved: Path) -> None:
    with pytest.raises(UsageError, match="must be those of the checkpoint") as refusal:
        Statistics(saved, "b" * 64)
    assert DIGEST in str(refusal.value)
    assert "b" * 64 in str(refusal.value)
    assert "kvexport calibrate" in str(refusal.value)


def _edit_header(folder: Path, **changes: object) -> None:
    path = folder / "statistics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("number", [0, 1, 3, "2", None])
def test_rejects_another_format(saved: Path, number: object) -> None:
    _edit_header(saved, format=number)
    with pytest.raises(UsageError, match="must have the format that this version reads"):
        Statistics(saved, DIGEST)


@pytest.mark.parametrize("content", ["", "{", "\xff", "[1]", "null"])
def test_rejects_an_invalid_header(saved: Path, content: str) -> None:
    (saved / "statistics.json").write_text(content, encoding="latin-1")
    with pytest.raises(UsageError, match="kvexport calibrate"):
        Statistics(saved, DIGEST)


def test_rejects_a_directory_without_statistics(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UsageError, match="must be a directory of calibration statistics"):
            Statistics(folder, DIGEST)


def test_rejects_changed_tokens(saved: Path) -> None:
    path = saved / "tokens.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UsageError, match="must be unchanged since it was written"):
        Statistics(saved, DIGEST)


@pytest.mark.parametrize("name", ["tokens.safetensors", "layer-00001.safetensors"])
@pytest.mark.parametrize("keep", [0, 20, -8, None])
def test_error_for_truncated_and_missing_files_names_them(saved: Path, name: str, keep: int | None) -> None:
    path = saved / name
    raw = path.read_bytes()
    path.unlink()
    if keep is not None:
        path.write_bytes(raw[:keep])
    with pytest.raises(UsageError, match=name):
        Statistics(saved, DIGEST).moments(1)


def test_rejects_incomplete_moments(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = saved / "layer-00000.safetensors"
    tensors = load_file(path)
    del tensors["overlap"]
    save_file(tensors, path)
    with pytest.raises(UsageError, match="must contain the moments of a layer"):
        Statistics(saved, DIGEST).moments(0)
