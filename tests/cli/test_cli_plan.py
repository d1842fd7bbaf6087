"""`kvexport plan`: a table and JSON that agree, exit codes, and a start without anything heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_bundles import write_bundle

from kvexport.cli import main
from kvexport.model.loader import load_decoder

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
Plan = Callable[..., tuple[object, str, str]]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Plan:
    """`plan(*arguments) -> exit code, standard output, standard error`."""
    monkeypatch.setattr("signal.signal", lambda *arguments: None)  # the process's handlers stay pytest's

    def call(*arguments: object) -> tuple[object, str, str]:
        code: object = 0
        try:
            main(["plan", *map(str, arguments)])
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return call


def table(shown: str) -> list[list[str]]:
    """The cells of the rows that name a dtype, split at runs of spaces of two or more."""
    lines = [line for line in shown.splitlines() if line.startswith(("float", "int")) and " GiB " in line]
    return [[cell.strip() for cell in line.replace("  ", "\t").split("\t") if cell.strip()] for line in lines]


def test_the_table_says_what_fits(plan: Plan, llama: Path) -> None:
    code, shown, said = plan(llama, "--target", "orin-nano-8gb-super", "--context", 2048)
    assert (code, said) == (0, "")
    rows = {(cells[0], int(cells[1])): cells for cells in table(shown)}
    assert set(rows) == {(dtype, heads) for dtype in ("float16", "int8", "int4") for heads in (32, 16, 8)}
    assert any("lacks" in cell for cell in rows["float16", 32])
    assert any("lacks" in cell for cell in rows["int4", 32])
    assert "1.0 GiB" in rows["int4", 32]  # of cache
    assert any(cell == "256.0 MiB" for cell in rows["int4", 8])
    for text in ("estimate", "4.0 GiB (50% of 8.0 GiB)", "key and query maps", "for planning"):
        assert text in shown


def test_json_agrees_with_the_table(plan: Plan, llama: Path) -> None:
    arguments = (llama, "--target", "agx-orin-64gb", "--dtype", "int4", "--kv-heads", 8, "--context", 1024)
    raw = json.loads(plan(*arguments, "--json")[1])
    (row,) = raw["rows"]
    (cells,) = table(plan(*arguments)[1])
    assert (row["dtype"], row["kv_heads"], row["memory"]["context"], row["fits"]) == ("int4", 8, 1024, True)
    assert cells[:3] == ["int4", "8", "1024"]
    assert "yes" in cells
    assert f"{row['memory']['weights'] / 2**30:.1f} GiB" in cells
    assert cells[-1].startswith(f"{1 / row['decode_seconds']['typical']:,.0f}/s")


def test_a_budget_of_tokens_is_what_the_cache_takes(plan: Plan, llama: Path) -> None:
    arguments = (llama, "--dtype", "float16", "--kv-heads", 8, "--context", 4096)
    budget = ("--kv-budget", "0.25", "--evict-skip-layers", "0,1")
    code, shown, said = plan(*arguments, *budget)
    assert (code, said) == (0, "")
    (cells,), (whole,) = table(shown), table(plan(*arguments)[1])
    held = 2 * 4096 * 4096 + 30 * 1024 * (4096 + 8 * 8)
    assert (cells[4], whole[4]) == (f"{held / 2**20:.1f} MiB", "512.0 MiB")
    assert "a budget of 1024 tokens in each KV head, each with 8 bytes of score and position" in shown
    assert "(of the KV above 1.9 MiB at most); layers 0, 1 hold the whole context." in shown
    raw = json.loads(plan(*arguments, *budget, "--json")[1])
    assert (raw["eviction"]["budget"], raw["eviction"]["skip_layers"]) == (1024, [0, 1])
    assert (raw["rows"][0]["memory"]["kv"], raw["rows"][0]["memory"]["kv_state"]) == (held, 30 * 1024 * 64)


def test_the_note_on_a_budget_names_a_single_layer_or_none(plan: Plan, llama: Path) -> None:
    assert "layer 3 holds the whole context." in plan(llama, "--kv-budget", 64, "--evict-skip-layers", 3)[1]
    assert "the whole context" not in plan(llama, "--kv-budget", 64)[1]
    assert "budget" not in plan(llama)[1]
    assert json.loads(plan(llama, "--json")[1])["eviction"] is None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--kv-budget", "many"), "whole number"),
        (("--kv-budget", "1.5"), "share"),
        (("--kv-budget", "4097"), "nothing would ever go"),
        (("--kv-budget", "64", "--evict-skip-layers", "first"), "no list of layers"),
        (("--evict-skip-layers", "0"), "add --kv-budget TOKENS"),
    ],
)
def test_a_wrong_budget_is_a_usage_error(plan: Plan, llama: Path, wrong: tuple[str, ...], said: str) -> None:
    code, shown, talk = plan(llama, *wrong)
    assert (code, shown) == (2, "")
    assert said in talk


def test_a_budget_beside_a_bundle_names_the_build(plan: Plan, tiny_checkpoint: Any, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", load_decoder(tiny_checkpoint("llama")))
    code, shown, said = plan(bundle, "--kv-budget", 16)
    assert (code, shown) == (2, "")
    assert "kvexport build CHECKPOINT -o BUNDLE --kv-budget" in said


def test_without_a_target_it_says_how_to_name_one(plan: Plan, llama: Path) -> None:
    code, shown, _ = plan(llama, "--dtype", "float16")
    assert code == 0
    assert "--target NAME" in shown
    assert "estimate" not in shown


def test_an_extrapolation_is_called_one(plan: Plan, llama: Path) -> None:
    assert "extrapolation" in plan(llama, "--target", "cpu")[1]
    assert "No prefill time" in plan(llama, "--target", "cpu")[1]
    shown = plan(llama, "--target", "agx-orin-64gb")[1]
    assert "extrapolation" not in shown
    assert "No prefill time" not in shown


def test_a_build_is_shown_beside_the_prediction(plan: Plan, tiny_checkpoint: Any, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", load_decoder(tiny_checkpoint("llama")))
    (bundle / "engines" / "rtx-4090").mkdir(parents=True)
    built: dict[str, Any] = {"engine": "tensorrt-rtx", "lowering": "std24", "plan": {"bytes": 12 * 2**20}}
    (bundle / "engines" / "rtx-4090" / "build.json").write_text(json.dumps(built))
    code, shown, _ = plan(bundle, "--target", "rtx-4090")
    assert code == 0
    (line,) = (line for line in shown.splitlines() if line.startswith("rtx-4090/build.json"))
    assert "plan" in line
    assert "12.0 MiB" in line


@pytest.mark.parametrize(
    "wrong",
    [
        ("--target", "toaster"),
        ("--kv-heads", "5"),
        ("--dtype", "fp8"),
        ("--context", "0"),
        ("--context", "4097"),
    ],
)
def test_a_wrong_option_is_a_usage_error(plan: Plan, llama: Path, wrong: tuple[str, str]) -> None:
    code, shown, said = plan(llama, *wrong)
    assert (code, shown) == (2, "")
    assert wrong[1] in said


def test_what_is_no_model_is_a_usage_error(plan: Plan, tmp_path: Path) -> None:
    assert plan(tmp_path)[0] == 2
    assert plan(tmp_path / "nowhere")[0] == 2
    (tmp_path / "weights.bin").touch()
    assert plan(tmp_path / "weights.bin")[0] == 2
    for text in ("{", json.dumps({"model_type": "llama"})[:-1] + ', "hidden_size": ' + "1" * 5000 + "}"):
        (tmp_path / "config.json").write_text(text)
        code, _, said = plan(tmp_path)
        assert code == 2 and "is not JSON" in said


def test_it_needs_nothing_but_the_base_install(llama: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'safetensors', 'onnx', 'onnx_ir', 'onnxruntime', 'transformers', 'ml_dtypes', 'psutil'):\n"
        "    sys.modules[name] = None  # as if it were not installed\n"
        "from kvexport.cli import main\n"
        f"main(['plan', {str(llama)!r}, '--target', 'orin-nano-8gb'])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "float16" in ran.stdout
