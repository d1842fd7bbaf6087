"""Tests of `kvexport plan`: table, JSON, exit codes, and imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.command_line import Ended, run_kvexport
from support.tiny_bundles import write_bundle

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


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def plan(*arguments: object) -> Ended:
    """Run `kvexport plan`: exit code, standard output, standard error."""
    return run_kvexport("plan", *arguments)


def table(out: str) -> list[list[str]]:
    """The cells of the rows of the last table but comparisons, split at runs of two or more spaces."""
    table = out.split("max context")[1]
    lines = [line for line in table.splitlines() if line.startswith(("float", "int")) and "iB " in line]
    return [[cell.strip() for cell in line.replace("  ", "\t").split("\t") if cell.strip()] for line in lines]


def test_the_table_shows_what_fits(llama: Path) -> None:
    code, out, err = plan(llama, "--target", "orin-nano-8gb-super", "--context", 2048)
    assert (code, err) == (0, "")
    rows = {(cells[0], int(cells[1])): cells for cells in table(out)}
    assert set(rows) == {(dtype, heads) for dtype in ("float16", "int8", "int4") for heads in (32, 16, 8)}
    assert any("short" in cell for cell in rows["float16", 32])
    assert any("short" in cell for cell in rows["int4", 32])
    assert "1.0 GiB" in rows["int4", 32]  # of KV cache
    assert any(cell == "256.0 MiB" for cell in rows["int4", 8])
    for text in (
        "estimate",
        "4.0 GiB usable by an application (50% of 8.0 GiB)",
        "key and query maps",
        "Every figure is calculated",
    ):
        assert text in out


def test_json_agrees_with_the_table(llama: Path) -> None:
    arguments = (llama, "--target", "agx-orin-64gb", "--weights", "int4", "--kv-heads", 8, "--context", 1024)
    raw = json.loads(plan(*arguments, "--json")[1])
    (row,) = raw["rows"]
    (cells,) = table(plan(*arguments)[1])
    assert (row["dtype"], row["kv_heads"], row["memory"]["context"], row["fits"]) == (
        "float16",
        8,
        1024,
        True,
    )
    assert row["formats"] == {"layers": "int4", "embedding": "int4", "head": "int4", "block": 128}
    assert (row["weight_bits"], row["weights"]["total"]) == (5, row["memory"]["weights"])
    assert cells[:3] == ["int4", "8", "1024"]
    assert "yes" in cells
    assert f"{row['memory']['weights'] / 2**30:.1f} GiB" in cells
    assert cells[-1].startswith(f"{1 / row['decode_seconds']['typical']:,.0f}/s")


def test_formats_of_embedding_and_head_are_those_of_build(llama: Path) -> None:
    arguments = (llama, "--kv-heads", 32, "--context", 1024, "--weights", "int4", "--json")

    def weights(*options: object) -> dict[str, Any]:
        (row,) = json.loads(plan(*arguments, *options)[1])["rows"]
        assert (
            sum(row["weights"][part] for part in ("layers", "embedding", "head", "other", "eight_bits"))
            == (row["weights"]["total"])
        )
        found: dict[str, Any] = row["weights"]
        return found

    table = 32_000 * 4096
    alone, head, embedding = (
        weights(),
        weights("--head-weights", "int8"),
        weights("--embedding-weights", "float16"),
    )
    assert (alone["embedding"], alone["head"]) == (table // 2 + table // 64,) * 2
    assert (head["embedding"], head["head"]) == (alone["embedding"], table + 2 * 32_000 + 1536)  # to a page
    assert (embedding["embedding"], embedding["head"]) == (2 * table, alone["head"])
    assert weights("--weight-block", 32)["scales"] == 4 * alone["scales"]
    numbers = 6_738_415_616 - 65 * 4096  # without norms
    mean = 8 * (alone["layers"] + alone["embedding"] + alone["head"] + alone["eight_bits"]) / numbers
    assert mean == pytest.approx(5, rel=1e-4)
    more = weights("--weight-bits", 6)["eight_bits"] - alone["eight_bits"]
    assert more == pytest.approx(numbers / 8, rel=1e-6)
    assert weights("--weight-bits", 4.126)["eight_bits"] < numbers / 8000
    only_layers = weights("--head-weights", "int4", "--embedding-weights", "int4")["eight_bits"]
    assert only_layers == pytest.approx(alone["eight_bits"] * (1 - 2 * table / numbers), rel=1e-3)
    all_eight = weights("--weight-bits", 12)
    assert all_eight["total"] == pytest.approx(1.0005 * numbers, rel=2e-3)
    code, _, err = plan(llama, "--weight-bits", 4)
    assert code == 2 and "at least 4.126" in err
    assert plan(llama, "--weights", "bfloat16")[0] == 2
    code, _, err = plan(llama, "--weights", "float32")
    assert code == 2 and "--weights must be int8, int4 or the data type of computation" in err


def test_the_weights_table_has_a_row_for_each_format(llama: Path) -> None:
    out = plan(llama, "--kv-heads", 32, "--head-weights", "int8")[1].split("max context")[0]
    assert [line.split("  ")[0] for line in out.splitlines() if " GiB" in line] == [
        "float16; head int8; embedding float16",
        "int8",
        "int4; head int8; embedding int4",
    ]


def test_the_jetpack_version_chooses_the_lowering(llama: Path) -> None:
    arguments = (llama, "--target", "orin-nano-8gb", "--weights", "int4", "--json")
    old, new = (json.loads(plan(*arguments, "--jetpack", version)[1]) for version in ("6.2", "7.2"))
    assert (old["lowering"], new["lowering"]) == ("decomposed17", "std24")
    assert old["rows"][0]["memory"]["activations"] > new["rows"][0]["memory"]["activations"]
    code, _, err = plan(llama, "--jetpack", "6.2")
    assert code == 2 and "add --target NAME" in err


def test_a_kv_budget_limits_the_size_of_the_cache(llama: Path) -> None:
    arguments = (llama, "--weights", "float16", "--kv-heads", 8, "--context", 4096)
    budget = ("--kv-budget", "0.25", "--evict-skip-layers", "0,1")
    code, out, err = plan(*arguments, *budget)
    assert (code, err) == (0, "")
    (cells,), (whole,) = table(out), table(plan(*arguments)[1])
    held = 2 * 4096 * 4096 + 30 * 1024 * (4096 + 8 * 8)
    assert (cells[4], whole[4]) == (f"{held / 2**20:.1f} MiB", "512.0 MiB")
    assert "a budget of 1024 tokens in each KV head, each with 8 bytes of score and position" in out
    assert "(at most 1.9 MiB of the KV cache); layers 0, 1 do not evict." in out
    raw = json.loads(plan(*arguments, *budget, "--json")[1])
    assert (raw["eviction"]["budget"], raw["eviction"]["skip_layers"]) == (1024, [0, 1])
    assert (raw["rows"][0]["memory"]["kv"], raw["rows"][0]["memory"]["kv_state"]) == (held, 30 * 1024 * 64)


def test_the_note_on_the_budget_names_the_layers_that_keep_everything(llama: Path) -> None:
    assert "layer 3 does not evict." in plan(llama, "--kv-budget", 64, "--evict-skip-layers", 3)[1]
    assert "not evict" not in plan(llama, "--kv-budget", 64)[1]
    assert "budget" not in plan(llama)[1]
    assert json.loads(plan(llama, "--json")[1])["eviction"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kv-budget", "many"), "integer >= 1"),
        (("--kv-budget", "1.5"), "fraction in"),
        (("--kv-budget", "4097"), "must be at most the capacity"),
        (("--kv-budget", "64", "--evict-skip-layers", "first"), "must be a list of layer numbers"),
        (("--evict-skip-layers", "0"), "add --kv-budget TOKENS"),
    ],
)
def test_rejects_an_invalid_budget(llama: Path, options: tuple[str, ...], message: str) -> None:
    code, out, err = plan(llama, *options)
    assert (code, out) == (2, "")
    assert message in err


def test_a_budget_for_a_bundle_is_rejected_with_the_build_command(
    tiny_checkpoint: Any, tmp_path: Path
) -> None:
    bundle = write_bundle(tmp_path / "bundle", load_decoder(tiny_checkpoint("llama")))
    code, out, err = plan(bundle, "--kv-budget", 16)
    assert (code, out) == (2, "")
    assert "kvexport build CHECKPOINT -o BUNDLE --kv-budget" in err


def test_without_a_target_the_note_explains_how_to_name_one(llama: Path) -> None:
    code, out, _ = plan(llama, "--weights", "float16")
    assert code == 0
    assert "--target NAME" in out
    assert "estimate" not in out


def test_times_outside_the_measured_devices_are_called_an_extrapolation(llama: Path) -> None:
    assert "extrapolation" in plan(llama, "--target", "cpu")[1]
    assert "No prefill time" in plan(llama, "--target", "cpu")[1]
    out = plan(llama, "--target", "agx-orin-64gb")[1]
    assert "extrapolation" not in out
    assert "No prefill time" not in out


def test_an_engine_build_is_compared_with_the_prediction(tiny_checkpoint: Any, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", load_decoder(tiny_checkpoint("llama")))
    (bundle / "engines" / "rtx-4090").mkdir(parents=True)
    built: dict[str, Any] = {"engine": "tensorrt-rtx", "lowering": "std24", "plan": {"bytes": 12 * 2**20}}
    (bundle / "engines" / "rtx-4090" / "build.json").write_text(json.dumps(built))
    code, out, _ = plan(bundle, "--target", "rtx-4090")
    assert code == 0
    (line,) = (line for line in out.splitlines() if line.startswith("rtx-4090/build.json"))
    assert "plan" in line
    assert "12.0 MiB" in line


@pytest.mark.parametrize(
    "option",
    [
        ("--target", "toaster"),
        ("--kv-heads", "5"),
        ("--dtype", "fp8"),
        ("--context", "0"),
        ("--context", "4097"),
    ],
)
def test_rejects_an_invalid_option_and_names_its_value(llama: Path, option: tuple[str, str]) -> None:
    code, out, err = plan(llama, *option)
    assert (code, out) == (2, "")
    assert option[1] in err


def test_rejects_a_path_without_a_readable_config(tmp_path: Path) -> None:
    assert plan(tmp_path)[0] == 2
    assert plan(tmp_path / "nowhere")[0] == 2
    (tmp_path / "weights.bin").touch()
    assert plan(tmp_path / "weights.bin")[0] == 2
    for text in ("{", json.dumps({"model_type": "llama"})[:-1] + ', "hidden_size": ' + "1" * 5000 + "}"):
        (tmp_path / "config.json").write_text(text)
        code, _, err = plan(tmp_path)
        assert code == 2 and "must be JSON" in err


def test_needs_only_the_packages_of_the_base_install(llama: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'safetensors', 'onnx', 'onnx_ir', 'onnxruntime', 'transformers', 'ml_dtypes', "
        "'psutil'):\n"
        "    sys.modules[name] = None  # as if it were not installed\n"
        "from kvexport.cli import main\n"
        f"main(['plan', {str(llama)!r}, '--target', 'orin-nano-8gb'])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "float16" in ran.stdout


@pytest.mark.parametrize(
    ("rope", "trained", "longest"),
    [
        ({"type": "linear", "factor": 4.0}, 64, 256),  # as Vicuna 16k: 4096 and 16384
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},  # as Qwen2.5 with YaRN
            64,
            256,
        ),
        (None, 64, 64),
    ],
)
def test_contexts_of_plan_and_build_reach_as_far_as_the_scaled_rope(
    tiny_checkpoint: Any, tmp_path: Path, rope: dict[str, Any] | None, trained: int, longest: int
) -> None:
    model = tiny_checkpoint("llama", max_position_embeddings=trained, rope_scaling=rope)
    assert plan(model, "--context", longest)[0] == 0
    for command in (
        ("plan", model, "--context", longest + 1),
        ("build", model, "-o", tmp_path / "bundle", "--capacity", longest + 1),
    ):
        code, _, err = run_kvexport(*command)
        assert code == 2
        assert f"1 to {longest}" in err
