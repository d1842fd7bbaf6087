"""benchmarks/calibration_text.py at a tiny size: rows, table, resumption."""

from __future__ import annotations

import importlib
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from support.tiny_bundles import byte_level_tokenizer

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
calibration_text = importlib.import_module("calibration_text")


def _text(path: Path, letters: str) -> Path:
    path.write_text("".join(random.Random(0).choices(letters, k=1200)), encoding="utf-8")
    return path


@pytest.mark.slow
def test_rows_by_calibration_text(tiny_checkpoint: Any, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_checkpoint("llama", vocab_size=320, num_key_value_heads=4), folder)
    (folder / "tokenizer.json").write_text(byte_level_tokenizer(), encoding="utf-8")
    evaluated, same = _text(tmp_path / "a.txt", "abcd"), _text(tmp_path / "b.txt", "abcd")
    output = tmp_path / "record"
    arguments = [str(folder), "--text", f"letters={evaluated}", "--length", "32", "--windows", "4"]
    arguments += ["--samples", "8", "--output", str(output)]
    calibration_text.main([*arguments, "--calibration", "random"])
    calibration_text.main([*arguments, "--calibration", f"same={same}", "--resume"])
    record = json.loads(output.with_suffix(".json").read_text())
    assert list(record["rows"]) == ["random", "same"]
    losses = {name: row["kl"]["letters"] for name, row in record["rows"].items()}
    assert 0 < losses["same"] < losses["random"]
    assert record["rows"]["same"]["calibration"]["file"] == "b.txt"
    table = output.with_suffix(".md").read_text()
    assert f"| same | {losses['same']:.4f} |" in table and "| random |" in table
    with pytest.raises(SystemExit):  # other evaluation windows
        calibration_text.main([*arguments, "--calibration", "random", "--resume", "--windows", "3"])
