"""Tests of `kvexport analyze`: the page, the JSON object, and the options that it rejects before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_bundles import byte_level_tokenizer

from kvexport.cli.analyze import command
from kvexport.errors import UsageError

Run = Callable[..., None]


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and a text file."""
    folder = tmp_path_factory.mktemp("analyze")
    shutil.copytree(tiny_checkpoint("llama", vocab_size=300, num_key_value_heads=4), folder / "checkpoint")
    (folder / "checkpoint" / "tokenizer.json").write_text(byte_level_tokenizer(300), encoding="utf-8")
    (folder / "text.txt").write_text("Once upon a time there was a small café. " * 3, encoding="utf-8")
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Run:
    def call(*options: object) -> None:
        given = [
            folder / "checkpoint",
            "-o",
            tmp_path / "page.html",
            "--samples",
            8,
            "--length",
            24,
            *options,
        ]
        command.main([str(each) for each in given], standalone_mode=False)

    return call


def test_page_and_json_show_the_same_analysis(
    run: Run, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--json", "--pairs", "12:3,7:7", "--tokens", 16, "--kv-ratio", 0.25, "--text", folder / "text.txt")
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert data["model"]["name"] == "checkpoint"
    assert data["model"]["calibration_tokens"] == 8 * 24
    assert data["kv_ratio"] == 0.25
    assert data["divergence"]["mean_kl"] > 0
    assert [layer["layer"] for layer in data["layers"]] == [0, 1]
    assert len(data["layers"][0]["spectra"]["key_before_rope"]["singular_values"]) == 4 * 8
    assert all(layer["report"]["measured_error"] > 0 for layer in data["layers"])
    assert "".join(data["attention"]["tokens"]).startswith("Once upon a")
    assert [(each["query"], each["key"]) for each in data["attention"]["pairs"]] == [(12, 3), (7, 7)]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert data["attention"]["compressed"][1][3] in page
    assert f"{data['divergence']['mean_kl']:.5f}" in page


@pytest.mark.slow
def test_prints_a_table_unless_quiet(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--tokens", 8)
    out = capsys.readouterr().out
    assert "measured error" in out and f"wrote {tmp_path / 'page.html'}" in out
    run("--tokens", 8, "--force", "--quiet")
    assert capsys.readouterr() == ("", "")


def test_analyzes_the_original_model_if_all_heads_are_kept(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--json", "--kv-ratio", 1, "--tokens", 8, "--calibration", "random")
    data = json.loads(capsys.readouterr().out)
    assert data["divergence"]["mean_kl"] == 0
    assert data["attention"]["original"] == data["attention"]["compressed"]
    assert data["layers"][0]["tightness"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pairs", "3:12"], "--pairs must be positions of the text, with no key after its query"),
        (["--pairs", "48:1"], "--pairs must be positions of the text, with no key after its query"),
        (["--method", "svd-a", "--kv-ratio", "0.3"], "must give a number of KV heads"),
        (["--kv-heads", "3"], "must divide"),
        (["--text", "absent.txt"], "must be readable"),
        (["--calibration", "absent.txt"], "--calibration must be a recipe or a file"),
        (["--calibration", 300 * "a"], "--calibration must be a recipe or a file"),
    ],
)
def test_rejects_invalid_options_and_writes_nothing(
    run: Run, tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(*options)
    assert list(tmp_path.iterdir()) == []


def test_keeps_an_existing_page(run: Run, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("mine")
    cases = (([], "must not exist yet"), (["--force"], "must be a page of kvexport analyze"))
    for options, message in cases:
        with pytest.raises(UsageError, match=message):
            run(*options)
    assert (tmp_path / "page.html").read_text() == "mine"


def test_rejects_pairs_beyond_the_end_of_a_short_text(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Once upon a")
    with pytest.raises(UsageError, match="--pairs must be positions of the text, with no key after"):
        run("--pairs", "40:1", "--text", tmp_path / "short.txt")
