"""benchmarks/weight_quality.py at a tiny size: rows, table, resumption."""

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
weight_quality = importlib.import_module("weight_quality")


def _text(path: Path, letters: str) -> Path:
    path.write_text("".join(random.Random(0).choices(letters, k=1200)), encoding="utf-8")
    return path


@pytest.mark.slow
def test_rows_by_format(tiny_checkpoint: Any, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(
        tiny_checkpoint(
            "llama", vocab_size=320, num_key_value_heads=4, hidden_size=64, intermediate_size=128
        ),
        folder,
    )
    (folder / "tokenizer.json").write_text(byte_level_tokenizer(), encoding="utf-8")
    evaluated, train = _text(tmp_path / "a.txt", "abcd"), _text(tmp_path / "b.txt", "abcd")
    output = tmp_path / "record"
    arguments = [str(folder), "--text", f"letters={evaluated}", "--length", "32", "--windows", "4"]
    arguments += ["--calibration", str(train), "--samples", "8", "--output", str(output)]
    weight_quality.main([*arguments, "--only", "llama.cpp*", "int8*", "onnx*"])
    weight_quality.main([*arguments, "--resume", "--only", "gptq, block 32", "nearest, block 32"])
    record = json.loads(output.with_suffix(".json").read_text())
    kl = {name: row["texts"]["letters"]["mean_kl"] for name, row in record["rows"].items()}
    assert "gptq, block 32" in kl and "gptq, block 64" not in kl
    assert kl["int8 a row"] < 0.1 * kl["nearest, block 32"]
    for name in ("llama.cpp Q4_0", "llama.cpp Q4_1", "onnxruntime-genai int4, block 32"):
        assert kl["llama.cpp Q8_0"] < 0.1 * kl[name] < kl["nearest, block 32"]
    bits = {name: row["bits"] for name, row in record["rows"].items()}
    assert bits["llama.cpp Q4_0"] == bits["gptq, block 32"] == bits["nearest, block 32"] == 4.5
    assert f"| {kl['gptq, block 32']:.4f} |" in output.with_suffix(".md").read_text()
    whole = ["whole: default", "whole: llama.cpp Q4_1", "whole: head int8*", "whole: onnx*"]
    weight_quality.main([*arguments, "--resume", "--only", *whole])
    rows = json.loads(output.with_suffix(".json").read_text())["rows"]
    default, other = rows["whole: default"], rows["whole: head int8, 5 bits"]
    assert 4.75 < default["bits"] <= 5 and 4.75 < other["bits"] <= 5
    assert default["eight_bits"] and default["predicted_kl"] > 0
    assert rows["whole: onnxruntime-genai int4, block 32"]["bits"] > 4.5
    assert (
        default["texts"]["letters"]["mean_kl"] < rows["whole: llama.cpp Q4_1"]["texts"]["letters"]["mean_kl"]
    )
    with pytest.raises(SystemExit):  # other evaluation windows
        weight_quality.main([*arguments, "--resume", "--windows", "3"])
