"""Tests of `kvexport build` from end to end, on tiny random checkpoints."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import kvexport
from kvexport.build import BuildHooks, BuildOptions
from kvexport.build import build as build_bundle
from kvexport.bundle import Bundle
from kvexport.calibrate import recipe_for
from kvexport.cli import commands
from kvexport.errors import GateFailed, KvexportError, UsageError
from kvexport.model.decoder import Layer
from kvexport.progress import Progress
from kvexport.runtime.self_test.verdict import self_test
from kvexport.validate import validate_bundle

FAST = ["--calibration", "random", "--samples", "8", "--length", "24"]


class NoCalibration(Progress):
    """Fails the test when calibration begins."""

    def stage(self, name: str, steps: int) -> Any:
        assert "calibration text" not in name, f"the stage began: {name}"
        return super().stage(name, steps)


def cli(*arguments: object, progress: Progress | None = None) -> Result:
    """Run `kvexport ARGUMENTS`; `progress` replaces the progress bars."""
    return CliRunner().invoke(commands, [str(each) for each in arguments], obj=progress)


def build(
    checkpoint: Path, output: Path, *options: object, progress: Progress | None = None
) -> dict[str, Any]:
    """Run `kvexport build`, and return its report; raises what it raised."""
    result = cli("build", checkpoint, "-o", output, *FAST, "--json", *options, progress=progress)
    if result.exception is not None:
        raise result.exception
    report: dict[str, Any] = json.loads(result.stdout)
    return report


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "mistral", "bloom", "qwen2", "qwen3"])
def test_a_bundle_of_every_family_and_dtype_passes_validation(
    tiny_checkpoint: Any, tmp_path: Path, family: str, dtype: str
) -> None:
    report = build(tiny_checkpoint(family), tmp_path / "b", "--kv-ratio", "0.5", "--dtype", dtype)
    assert report["validation"]["failures"] == []
    assert report["kv_bytes_per_token"] * 2 == report["kv_bytes_per_token_original"]
    bundle = Bundle.open(tmp_path / "b")
    bundle.verify()
    assert bundle.dtype == dtype
    assert not validate_bundle(tmp_path / "b", Progress()).failures
    if dtype != "bfloat16":  # ONNX Runtime has no bfloat16 kernels for the CPU
        assert self_test(tmp_path / "b").verdict == "ok"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]
    assert all(path.is_file() for path in (tmp_path / "b").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fold", "online", "svd-a", "svd-w", "mean-pool"])
def test_every_method_builds_a_bundle_with_a_smaller_cache(
    tiny_checkpoint: Any, tmp_path: Path, method: str
) -> None:
    source = tiny_checkpoint("llama", num_key_value_heads=4)
    report = build(source, tmp_path / "b", "--kv-heads", "1", "--method", method)
    assert [
        (layer["original_num_key_value_heads"], layer["num_key_value_heads"]) for layer in report["layers"]
    ] == [(4, 1)] * 2
    assert report["layers"][0]["method"] == method
    session = kvexport.open(tmp_path / "b")
    session.prefill([1, 2, 3])
    assert session.memory().bytes_per_token == report["kv_bytes_per_token"] == 2 * 2 * 8 * 4


def test_keeping_all_heads_exports_the_original_model(tiny_checkpoint: Any, tmp_path: Path) -> None:
    import torch

    from kvexport.model import reference
    from kvexport.model.loader import load_decoder

    source = tiny_checkpoint("llama")
    report = build(source, tmp_path / "b", "--kv-ratio", "1")
    assert report["divergence"] is None
    assert {layer["method"] for layer in report["layers"]} == {"none"}
    tokens = torch.randint(67, (1, 40), generator=torch.Generator().manual_seed(0))
    expected = reference.forward(load_decoder(source), tokens).numpy()
    assert np.allclose(kvexport.open(tmp_path / "b").score(tokens.numpy()), expected, atol=1e-4)


def test_windows_are_no_gain_of_compression(tiny_checkpoint: Any, tmp_path: Path) -> None:
    """The original's cache holds the windows of its layers alone, as an uncompressed bundle does."""
    source = tiny_checkpoint("mistral", sliding_window=16)
    report = build(source, tmp_path / "b", "--kv-ratio", "1", "--capacity", "256")
    held = Bundle.open(tmp_path / "b").kv_bytes(256)
    assert report["kv_bytes_at_capacity_original"] == report["kv_bytes_at_capacity"] == held
    assert held < 256 * report["kv_bytes_per_token_original"]


def test_a_model_that_is_not_compressed_needs_little_text(tiny_checkpoint: Any, tmp_path: Path) -> None:
    """4096 tokens, for validation and the self-test."""
    lengths: list[int] = []

    class Steps(Progress):
        def stage(self, name: str, steps: int) -> Any:
            if "calibration text" in name:
                lengths.append(steps)
            return super().stage(name, steps)

    options = ("--kv-ratio", "1", "--calibration", "self", "--samples", "1000", "--length", "128")
    build(tiny_checkpoint("llama"), tmp_path / "b", *options, progress=Steps())
    assert lengths == [127]  # 32 windows in one batch


def test_compress_does_not_replace_its_source(tiny_checkpoint: Any, edit_checkpoint: Any) -> None:
    source = edit_checkpoint(tiny_checkpoint("llama"))
    before = sorted((path.name, path.read_bytes()) for path in source.iterdir())
    result = cli("compress", source, "-o", source, "--force", *FAST)
    assert isinstance(result.exception, UsageError) and "must not be the checkpoint itself" in str(
        result.exception
    )
    assert sorted((path.name, path.read_bytes()) for path in source.iterdir()) == before


@pytest.mark.slow
def test_saved_statistics_give_a_byte_identical_bundle(tiny_checkpoint: Any, tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen2")
    build(source, tmp_path / "direct", "--no-cache")
    assert cli("calibrate", source, "-o", tmp_path / "statistics", *FAST, "--no-cache").exit_code == 0
    result = cli(
        "build", source, "-o", tmp_path / "reused", "--statistics", tmp_path / "statistics", "--quiet"
    )
    assert result.exit_code == 0
    for name in ("decoder.onnx", "decoder.onnx.data", "reference.npz"):
        assert (tmp_path / "direct" / name).read_bytes() == (tmp_path / "reused" / name).read_bytes()


def test_rejects_statistics_of_another_checkpoint(tiny_checkpoint: Any, tmp_path: Path) -> None:
    assert cli("calibrate", tiny_checkpoint("llama"), "-o", tmp_path / "statistics", *FAST).exit_code == 0
    with pytest.raises(KvexportError, match="the statistics must be those of the checkpoint"):
        other = tiny_checkpoint("llama", seed=1)
        result = cli("build", other, "-o", tmp_path / "b", "--statistics", tmp_path / "statistics")
        raise result.exception or AssertionError
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_the_bundle_depends_on_the_seed_only(tiny_checkpoint: Any, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    sampled = ["--calibration", "self", "--samples", "6", "--length", "20", "--no-cache"]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert cli("build", source, "-o", tmp_path / name, *sampled, "--seed", seed, "--quiet").exit_code == 0
    data = {name: (tmp_path / name / "decoder.onnx.data").read_bytes() for name in "abc"}
    assert data["a"] == data["b"] != data["c"]


def test_the_report_in_the_bundle_equals_the_json_output(tiny_checkpoint: Any, tmp_path: Path) -> None:
    report = build(tiny_checkpoint("llama"), tmp_path / "b")
    stored = json.loads((tmp_path / "b" / "report.json").read_text())
    assert stored == report
    assert {
        "source",
        "layers",
        "parameters",
        "parameters_original",
        "divergence",
        "validation",
        "seconds",
    } <= report.keys()
    assert {"mean_kl", "cross_entropy", "cross_entropy_original", "top1_agreement", "tokens"} <= report[
        "divergence"
    ].keys()
    assert all({"predicted_error", "measured_error"} <= layer.keys() for layer in report["layers"])


def test_quiet_prints_nothing_and_the_table_shows_sizes_and_losses(
    tiny_checkpoint: Any, tmp_path: Path
) -> None:
    quiet = cli("build", tiny_checkpoint("llama"), "-o", tmp_path / "quiet", *FAST, "--quiet")
    assert (quiet.stdout, quiet.stderr) == ("", "")
    shown = cli("build", tiny_checkpoint("llama"), "-o", tmp_path / "shown", *FAST)
    assert shown.stderr.startswith(
        "kvexport: the checkpoint has no tokenizer.json"
    )  # and there is no progress bar
    assert len(shown.stderr.splitlines()) == 1
    for words in (
        "2 → 1",
        "KV cache per token",
        "predicted error",
        "measured error",
        "validated against PyTorch: ok",
    ):
        assert words in shown.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kv-heads", "3"], "1, 2, 4"),
        (["--kv-ratio", "0.01"], "0.25 to 1"),
        (["--kv-ratio", "0.4", "--method", "mean-pool"], "0.25, 0.5, 1"),
        (["--kv-heads", "2", "--kv-ratio", "0.5"], "must not be given together"),
        (["--kv-ratio", "0.5", "--max-kl", "0.1"], "must not be given together"),
        (["--group-size", "3"], "1, 2, 4"),
        (["--max-kl", "0"], "above 0"),
        (["--max-kl", "0.1", "--method", "svd-a"], "--method auto, online, fold"),
        (["--heal-lora", "4"], "add --heal"),
        (["--target", "no-such-board"], "the target must be a shipped target"),
        (["--capacity", "257"], "1 to 256"),
        (["--capacity", "0"], "1 to 256"),
        (["--length", "300"], "at most 256"),
        (["--samples", "0"], "--samples"),
        (["--calibration", "nowhere.txt"], "self, random, or a file"),
    ],
)
def test_rejects_invalid_options_with_the_allowed_values(
    tiny_checkpoint: Any, tmp_path: Path, options: list[str], message: str
) -> None:
    result = cli(
        "build", tiny_checkpoint("llama", num_key_value_heads=4), "-o", tmp_path / "b", *FAST, *options
    )
    assert isinstance(result.exception, KvexportError)
    assert result.exception.exit_code == 2
    assert message in str(result.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least as long as one window"),
        ("a few words", "at least as long as one window"),
        (None, "tokenizer.json"),
    ],
)
def test_rejects_calibration_text_shorter_than_a_window(
    tiny_checkpoint: Any, tmp_path: Path, text: str | None, message: str
) -> None:
    source = tiny_checkpoint("llama", vocab_size=320)
    folder = tmp_path / "work"
    folder.mkdir()
    if text is not None:
        from support.tiny_bundles import byte_level_tokenizer

        copy = tmp_path / "checkpoint"
        shutil.copytree(source, copy)
        (copy / "tokenizer.json").write_text(byte_level_tokenizer())
        source = copy
    (tmp_path / "text.txt").write_text(text or "some text")
    result = cli("build", source, "-o", folder / "b", "--calibration", tmp_path / "text.txt")
    assert isinstance(result.exception, KvexportError)
    assert message in str(result.exception)
    assert list(folder.iterdir()) == []


def test_a_graph_that_does_not_match_its_reference_leaves_no_bundle(
    tiny_checkpoint: Any, tmp_path: Path
) -> None:
    layers: list[Layer] = []

    def wrong_second_layer(layer: Layer) -> Layer:
        layers.append(layer)
        assert layer.mlp_norm is not None
        wrong = dataclasses.replace(layer, mlp_norm=dataclasses.replace(layer.mlp_norm, eps=1.0))
        return wrong if len(layers) == 2 else layer

    options = BuildOptions(recipe_for("random", 8, 24))
    hooks = BuildHooks(graph_layer=wrong_second_layer)
    with pytest.raises(GateFailed, match=r"layers\.1\.residual") as failure:
        build_bundle(tiny_checkpoint("llama"), tmp_path / "b", options, Progress(), hooks=hooks)
    assert "layers.0.residual" not in str(failure.value)
    assert list(tmp_path.iterdir()) == []


def test_replaces_an_existing_output_only_with_force(tiny_checkpoint: Any, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    build(source, tmp_path / "b", "--seed", "1")
    before = (tmp_path / "b" / "manifest.json").read_bytes()
    with pytest.raises(KvexportError, match="--force"):
        build(source, tmp_path / "b")
    assert (tmp_path / "b" / "manifest.json").read_bytes() == before
    build(source, tmp_path / "b", "--force")
    assert (tmp_path / "b" / "manifest.json").read_bytes() != before


def test_rejects_fold_for_a_model_with_qk_norm_before_calibration(
    tiny_checkpoint: Any, tmp_path: Path
) -> None:
    with pytest.raises(KvexportError, match="QK-norm"):
        build(tiny_checkpoint("qwen3"), tmp_path / "b", "--method", "fold", progress=NoCalibration())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "least"),
    [(("--kv-ratio", "0.2"), "0.25"), (("--group-size", "1"), "1"), (("--kv-head-dim", "256"), "1")],
)
def test_rejects_a_ratio_below_the_smallest_cache_before_calibration(
    tiny_checkpoint: Any,
    tmp_path: Path,
    options: tuple[str, str],
    least: str,
) -> None:
    source = tiny_checkpoint("llama", num_key_value_heads=4)
    for command, output in (("build", "b"), ("analyze", "a.html")):
        result = cli(command, source, "-o", tmp_path / output, *options, progress=NoCalibration())
        assert isinstance(result.exception, KvexportError) and f"{least} to 1" in str(result.exception)
        assert result.exception.fix is not None and "--kv-ratio" in result.exception.fix
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "positions"),
    [("build", 128), ("build", 5), ("compress", 128), ("calibrate", 128), ("analyze", 128)],
)
def test_the_default_length_follows_the_model(
    tiny_checkpoint: Any, tmp_path: Path, command: str, positions: int
) -> None:
    source = tiny_checkpoint("llama", max_position_embeddings=positions)
    arguments = [command, source, "-o", tmp_path / "out", "--calibration", "random", "--samples", "8"]
    shown = cli(*arguments)
    assert shown.exit_code == 0, shown.exception
    assert f"calibration windows have {positions} tokens, not 256" in shown.stderr
    explicit = cli(*arguments, "--length", 256, "--force")
    assert isinstance(explicit.exception, KvexportError)
    assert f"at most {positions}" in str(explicit.exception)
    assert "calibration windows have" not in explicit.stderr


def test_converts_another_tokenizer_for_the_bundle(tiny_checkpoint: Any, tmp_path: Path) -> None:
    """vocab.json and merges.txt become tokenizer.json; `compress` keeps them as they are."""
    from support.tokenizer_shapes import shapes
    from tokenizers import Tokenizer

    text = shapes()["gpt2"][0]
    model = json.loads(text)["model"]
    source = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("llama", vocab_size=600), source)
    (source / "vocab.json").write_text(json.dumps(model["vocab"]))
    (source / "merges.txt").write_text("\n".join(" ".join(merge) for merge in model["merges"]))
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    shown = cli("build", source, "-o", tmp_path / "b", *FAST)
    assert shown.exit_code == 0 and "token ids only" not in shown.stderr
    session = kvexport.open(tmp_path / "b")
    prompt = "Once upon a time 12"
    expected = Tokenizer.from_str(text).encode(prompt).ids
    assert session.generate(prompt, max_new_tokens=1).prompt_tokens == len(expected)
    assert not (tmp_path / "b" / "vocab.json").exists()
    assert cli("compress", source, "-o", tmp_path / "c", *FAST, "--quiet").exit_code == 0
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / "c" / name).read_bytes() == (source / name).read_bytes()


def test_builds_without_text_if_the_tokenizer_cannot_be_converted(
    tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("llama"), source)
    (source / "tokenizer.model").write_bytes(b"never read")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    shown = cli("build", source, "-o", tmp_path / "b", *FAST)
    assert shown.exit_code == 0
    (note,) = shown.stderr.splitlines()
    assert "needs the package sentencepiece: the bundle takes and returns token ids only" in note
    assert note.endswith("pip install 'kvexport[convert]'")
    assert not (tmp_path / "b" / "tokenizer.json").exists()


@pytest.mark.parametrize("command", ["build", "compress", "analyze"])
def test_a_note_says_that_one_window_leaves_no_held_out_tokens(
    tiny_checkpoint: Any, tmp_path: Path, command: str
) -> None:
    for samples, expected in ((1, True), (2, False)):
        result = cli(
            command,
            tiny_checkpoint("llama"),
            "-o",
            tmp_path / f"{command}-{samples}",
            "--kv-heads",
            1,
            "--calibration",
            "random",
            "--samples",
            samples,
            "--length",
            80,
        )
        assert result.exit_code == 0
        assert ("no tokens are held out" in result.stderr) == expected
        assert "calibration tokens are few" not in result.stderr


def test_needs_either_demo_or_a_checkpoint(tmp_path: Path) -> None:
    for arguments in (
        ["build", "-o", tmp_path / "b"],
        ["build", "somewhere", "--demo", "-o", tmp_path / "b"],
    ):
        result = cli(*arguments)
        assert isinstance(result.exception, KvexportError)
        assert "--demo" in str(result.exception)


@pytest.mark.slow
def test_parts_that_overflow_float16_are_computed_in_float32_and_reported(
    tiny_checkpoint: Any, edit_checkpoint: Any, tmp_path: Path
) -> None:
    def enlarge(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] *= 5e4
        tensors["model.layers.1.mlp.down_proj.weight"] *= 1e-3

    source = edit_checkpoint(tiny_checkpoint("llama"), tensors=enlarge)
    for ratio in ("1", "0.5"):
        result = cli(
            "build",
            source,
            "-o",
            tmp_path / ratio,
            *FAST,
            "--json",
            "--dtype",
            "float16",
            "--kv-ratio",
            ratio,
        )
        assert result.exception is None, result.exception
        assert json.loads(result.stdout)["kept_float32"] == ["layers.1.mlp"]
        assert "computed in float32: layers.1.mlp" in result.stderr
    assert build(source, tmp_path / "wide")["kept_float32"] == []
