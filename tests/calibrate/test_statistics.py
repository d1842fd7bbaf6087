"""Saved statistics come back to the bit, and are refused where they do not belong."""

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
    attention, rope = make_attention("gqa", seed=seed)
    accumulator = MomentsAccumulator(attention)
    accumulator.add(random_inputs(2, 8, seed=seed), rope)
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
        found, wanted = statistics.moments(index), _moments(index)
        for name in MOMENT_NAMES:
            assert torch.equal(getattr(found, name), getattr(wanted, name))
            assert getattr(found, name).dtype == getattr(wanted, name).dtype


def test_statistics_name_no_path_of_the_machine_that_made_them(saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "corpus.txt"
    file.parent.mkdir()
    file.write_text("text")
    save_header(saved, DIGEST, recipe_for(str(file)), torch.zeros(1, 2, dtype=torch.int64))
    assert "deep" not in (saved / "statistics.json").read_text()


def test_statistics_of_another_checkpoint_are_refused(saved: Path) -> None:
    with pytest.raises(UsageError, match="belong to another checkpoint") as refusal:
        Statistics(saved, "b" * 64)
    assert DIGEST in str(refusal.value)
    assert "b" * 64 in str(refusal.value)
    assert "kvexport calibrate" in str(refusal.value)


def _edit_header(folder: Path, **changes: object) -> None:
    path = folder / "statistics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("number", [0, 1, 3, "2", None])
def test_another_format_is_refused(saved: Path, number: object) -> None:
    _edit_header(saved, format=number)
    with pytest.raises(UsageError, match="of a format that this version does not read"):
        Statistics(saved, DIGEST)


@pytest.mark.parametrize("content", ["", "{", "\xff", "[1]", "null"])
def test_a_header_that_is_none_is_refused(saved: Path, content: str) -> None:
    (saved / "statistics.json").write_text(content, encoding="latin-1")
    with pytest.raises(UsageError, match="kvexport calibrate"):
        Statistics(saved, DIGEST)


def test_a_folder_without_statistics_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UsageError, match="holds no calibration statistics"):
            Statistics(folder, DIGEST)


def test_tokens_that_changed_are_refused(saved: Path) -> None:
    path = saved / "tokens.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UsageError, match="damaged or exchanged"):
        Statistics(saved, DIGEST)


@pytest.mark.parametrize("name", ["tokens.safetensors", "layer-00001.safetensors"])
@pytest.mark.parametrize("keep", [0, 20, -8, None])
def test_truncated_and_missing_files_are_refused_by_name(saved: Path, name: str, keep: int | None) -> None:
    path = saved / name
    raw = path.read_bytes()
    path.unlink()
    if keep is not None:
        path.write_bytes(raw[:keep])
    with pytest.raises(UsageError, match=name):
        Statistics(saved, DIGEST).moments(1)


def test_moments_that_lack_some_are_refused(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = saved / "layer-00000.safetensors"
    held = load_file(path)
    del held["overlap"]
    save_file(held, path)
    with pytest.raises(UsageError, match="lacks moments"):
        Statistics(saved, DIGEST).moments(0)
