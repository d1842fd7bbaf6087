"""Saved statistics are restored exactly, and rejected if damaged or of another checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.decoders import make_attention, make_decoder, random_inputs

from kvexport.calibrate import (
    Moments,
    MomentsAccumulator,
    Recipe,
    Statistics,
    StatisticsSource,
    StatisticsWriter,
    recipe_for,
)
from kvexport.calibrate.moments import MOMENT_NAMES
from kvexport.calibrate.recipe import read_recipe
from kvexport.errors import UsageError
from kvexport.files.hashing import sha256_of
from kvexport.files.schema import Table

DIGEST = "a" * 64
DECODER = make_decoder(layers=2, vocab=48, max_positions=512)


def _moments(seed: int = 0) -> Moments:
    attention = make_attention("gqa", seed=seed)
    accumulator = MomentsAccumulator(attention)
    accumulator.add(random_inputs(2, 8, seed=seed))
    return accumulator.finish()


def _writer(folder: Path, recipe: Recipe) -> StatisticsWriter:
    return StatisticsWriter(folder, StatisticsSource(DIGEST, "model", recipe, 512))


def _sensitivity(index: int) -> dict[str, torch.Tensor]:
    return {"scale": torch.tensor(0.1 + index, dtype=torch.float64), "sizes": torch.tensor([1, 2])}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    folder.mkdir()
    writer = _writer(folder, recipe_for("self", samples=6, length=8))
    writer.save_tokens(torch.arange(48).view(6, 8))
    for index in range(2):
        writer.save_moments(index, _moments(index))
        writer.save_sensitivity(index, _sensitivity(index))
    writer.finish()
    return folder


def test_round_trip_is_exact(saved: Path) -> None:
    statistics = Statistics(saved, DIGEST, DECODER)
    assert torch.equal(statistics.windows, torch.arange(48).view(6, 8))
    assert statistics.windows.dtype == torch.int64
    assert statistics.recipe.to_json() == recipe_for("self", samples=6, length=8).to_json()
    assert statistics.capacity == 512
    for index in range(2):
        restored, original = statistics.moments(index), _moments(index)
        for name in MOMENT_NAMES:
            assert torch.equal(getattr(restored, name), getattr(original, name))
            assert getattr(restored, name).dtype == getattr(original, name).dtype
        sensitivity = statistics.sensitivity(index)
        assert sensitivity.keys() == _sensitivity(index).keys()
        assert all(torch.equal(sensitivity[name], value) for name, value in _sensitivity(index).items())


@pytest.mark.parametrize("name", ["layer-00001.safetensors", "sensitivity-00000.safetensors"])
def test_rejects_an_analysis_of_some_layers(saved: Path, name: str) -> None:
    assert Statistics(saved, DIGEST, DECODER).has_analysis  # control
    files = json.loads((saved / "statistics.json").read_text())["files"]
    _edit_header(saved, files={each: digest for each, digest in files.items() if each != name})
    with pytest.raises(UsageError, match="must name the files of calibration statistics") as refusal:
        Statistics(saved, DIGEST, DECODER)
    assert refusal.value.got == f"'{name}', which is missing"
    _edit_header(saved, files=files)
    with pytest.raises(UsageError, match="for 3 layers"):
        Statistics(saved, DIGEST, make_decoder(layers=3, vocab=48, max_positions=512))


@pytest.mark.parametrize(
    "tokens",
    [
        torch.tensor([[1, 48]], dtype=torch.int32),
        torch.tensor([[1, -1]], dtype=torch.int32),
        torch.zeros(0, 8, dtype=torch.int32),
        torch.zeros(8, dtype=torch.int32),
        torch.zeros(2, 1, dtype=torch.int32),
        torch.zeros(2, 513, dtype=torch.int32),
        torch.zeros(2, 8),
    ],
)
def test_rejects_tokens_that_are_not_the_models(saved: Path, tokens: torch.Tensor) -> None:
    path = saved / "tokens.safetensors"
    save_file({"tokens": tokens}, path)
    files = json.loads((saved / "statistics.json").read_text())["files"]
    _edit_header(saved, files=files | {path.name: sha256_of(path)})
    with pytest.raises(UsageError, match="must have token windows of the model"):
        Statistics(saved, DIGEST, DECODER)


@pytest.mark.parametrize(
    "header",
    [
        {"recipe": {"source": [1, 1, 1], "samples": float("nan")}},
        {"recipe": recipe_for("self").to_json() | {"samples": float("nan")}},
        {"recipe": recipe_for("self").to_json() | {"more": 1}},
        {"capacity": 10**40},
        {"capacity": 513},
    ],
    ids=str,
)
def test_rejects_a_recipe_or_capacity_that_no_build_has(saved: Path, header: dict[str, object]) -> None:
    _edit_header(saved, **header)
    with pytest.raises(UsageError, match="kvexport calibrate"):
        Statistics(saved, DIGEST, DECODER)


def test_a_pipe_is_not_waited_for(saved: Path) -> None:
    for name in ("tokens.safetensors", "statistics.json"):
        (saved / name).unlink()
        os.mkfifo(saved / name)
        with pytest.raises(UsageError, match="it is not a regular file"):
            Statistics(saved, DIGEST, DECODER)


def test_recipes_are_restored(tmp_path: Path) -> None:
    file = tmp_path / "a\nb\udcff.txt"
    file.touch()
    for recipe in (recipe_for("mixed").from_model("a reason"), recipe_for("mixed"), recipe_for(str(file))):
        table = Table.from_json(json.dumps(recipe.to_json()), "header")
        assert read_recipe(table).to_json() == recipe.to_json()


def test_a_directory_can_have_tokens_alone(tmp_path: Path) -> None:
    writer = _writer(tmp_path, recipe_for("random"))
    writer.save_tokens(torch.arange(48).view(6, 8))
    with pytest.raises(UsageError, match="must be a directory of calibration statistics"):
        Statistics(tmp_path, DIGEST, DECODER)  # not finished
    writer.finish()
    statistics = Statistics(tmp_path, DIGEST, DECODER)
    assert torch.equal(statistics.windows, torch.arange(48).view(6, 8))
    assert not statistics.has_analysis and not statistics.has_weights
    with pytest.raises(UsageError, match=r"must have the file .*layer-00000"):
        statistics.moments(0)


def test_header_contains_no_path(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "corpus.txt"
    file.parent.mkdir()
    file.write_text("text")
    _writer(tmp_path, recipe_for(str(file))).finish()
    text = (tmp_path / "statistics.json").read_text()
    assert "deep" not in text and "corpus.txt" in text


def test_rejects_statistics_of_another_checkpoint(saved: Path) -> None:
    with pytest.raises(UsageError, match="must be those of the checkpoint") as refusal:
        Statistics(saved, "b" * 64, DECODER)
    assert DIGEST in str(refusal.value)
    assert "b" * 64 in str(refusal.value)
    assert "kvexport calibrate" in str(refusal.value)


def _edit_header(folder: Path, **changes: object) -> None:
    path = folder / "statistics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("number", [0, 1, 2, 3, 5, "4", None])
def test_rejects_another_format(saved: Path, number: object) -> None:
    _edit_header(saved, format=number)
    with pytest.raises(UsageError, match="must have the format that this version reads"):
        Statistics(saved, DIGEST, DECODER)


@pytest.mark.parametrize("content", ["", "{", "\xff", "[1]", "null"])
def test_rejects_an_invalid_header(saved: Path, content: str) -> None:
    (saved / "statistics.json").write_text(content, encoding="latin-1")
    with pytest.raises(UsageError, match="kvexport calibrate"):
        Statistics(saved, DIGEST, DECODER)


def test_rejects_a_directory_without_statistics(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UsageError, match="must be a directory of calibration statistics"):
            Statistics(folder, DIGEST, DECODER)


@pytest.mark.parametrize("name", ["/etc/hostname", "../saved/tokens.safetensors"])
def test_rejects_files_outside_the_directory(saved: Path, name: str) -> None:
    header = json.loads((saved / "statistics.json").read_text())
    _edit_header(saved, files=header["files"] | {name: "0" * 64})
    with pytest.raises(UsageError, match="must name the files of calibration statistics"):
        Statistics(saved, DIGEST, DECODER)


_FILES = ["tokens.safetensors", "layer-00001.safetensors", "sensitivity-00000.safetensors"]


@pytest.mark.parametrize("name", _FILES)
def test_rejects_changed_files(saved: Path, name: str) -> None:
    path = saved / name
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UsageError, match=f"{name} must be unchanged since it was written"):
        Statistics(saved, DIGEST, DECODER)


@pytest.mark.parametrize("name", _FILES)
@pytest.mark.parametrize("keep", [0, 20, -8, None])
def test_error_for_truncated_and_missing_files_names_them(saved: Path, name: str, keep: int | None) -> None:
    path = saved / name
    raw = path.read_bytes()
    path.unlink()
    if keep is not None:
        path.write_bytes(raw[:keep])
    with pytest.raises(UsageError, match=name):
        Statistics(saved, DIGEST, DECODER)


def test_rejects_incomplete_moments(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = saved / "layer-00000.safetensors"
    tensors = load_file(path)
    del tensors["overlap"]
    save_file(tensors, path)
    files = json.loads((saved / "statistics.json").read_text())["files"]
    _edit_header(saved, files=files | {path.name: sha256_of(path)})
    with pytest.raises(UsageError, match="must contain the tensors of this format"):
        Statistics(saved, DIGEST, DECODER).moments(0)
