"""Builds with integer weights: formats, exact validation, and the loss that is reported apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.command_line import run_kvexport
from support.validated_bundles import broken, edit_weight

from kvexport.bundle import Bundle
from kvexport.bundle.formats import WeightFormat
from kvexport.graph import GRAPH_FILE
from kvexport.progress import Progress
from kvexport.runtime import open_bundle
from kvexport.runtime.self_test.verdict import self_test
from kvexport.validate import validate_bundle

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 68}
OPTIONS = ("--calibration", "random", "--samples", "8", "--length", "32", "--no-cache", "--json")


def built(checkpoint: Path, output: Path, *options: str) -> dict[str, Any]:
    code, out, err = run_kvexport("build", checkpoint, "-o", output, *OPTIONS, *options)
    assert code == 0, err
    report: dict[str, Any] = json.loads(out)
    return report


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_a_quantised_bundle_is_validated_as_tightly_as_a_float_one(
    name: str, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    report = built(
        tiny_checkpoint("llama", **SIZES), tmp_path / "bundle", "--weights", name, "--kv-heads", "1"
    )
    assert report["validation"]["gate"]["max_error"] == 1e-3 and report["validation"]["failures"] == []
    assert 0 < report["quantization"]["mean_kl"] < (0.5 if name == "int4" else 5e-3)
    assert report["divergence"]["mean_kl"] > 0  # from compression, reported apart
    validation = validate_bundle(tmp_path / "bundle", Progress(), "cpu")
    assert validation.failures == () and validation.worst("logits").max_error < 1e-3
    assert validation.int8_activations is not None and validation.int8_activations.mean_kl > 0
    assert self_test(tmp_path / "bundle", "cpu").verdict == "ok"
    bundle = Bundle.open(tmp_path / "bundle")
    block = 64 if name == "int4" else None
    assert {*bundle.weights.formats} == {WeightFormat(name, block)}
    assert report["weight_bytes"] == (tmp_path / "bundle" / "decoder.onnx.data").stat().st_size


def test_a_changed_scale_fails_validation(tiny_checkpoint: Any, tmp_path: Path) -> None:
    built(tiny_checkpoint("llama", **SIZES), tmp_path / "valid", "--weights", "int4", "--kv-ratio", "1")

    def enlarge(scales: Any) -> None:
        scales[0, 0] *= 2

    damage = edit_weight("layers.1.mlp.down.weight.scale", enlarge)
    report = validate_bundle(broken(tmp_path / "valid", tmp_path / "broken", damage), Progress(), "cpu")
    assert any("layers.1.residual" in failure for failure in report.failures)
    assert not any("layers.0" in failure for failure in report.failures)


def test_a_session_gives_the_logits_of_the_quantised_reference(tiny_checkpoint: Any, tmp_path: Path) -> None:
    built(tiny_checkpoint("llama", **SIZES), tmp_path / "bundle", "--weights", "int4", "--kv-ratio", "1")
    with np.load(tmp_path / "bundle" / "reference.npz") as file:
        ids, expected = file["input_ids"], file["logits"]
    logits = open_bundle(tmp_path / "bundle", provider="cpu").score(ids[None])[0]
    error = float(np.abs(logits - expected).max() / np.sqrt(np.mean(expected**2)))
    assert 1e-4 < error < 0.3  # activations in int8


def test_layers_embedding_and_head_have_formats_of_their_own(tiny_checkpoint: Any, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("llama", **SIZES)
    options = ("--weights", "int4", "--weight-block", "32", "--head-weights", "int8", "--kv-ratio", "1")
    report = built(checkpoint, tmp_path / "bundle", *options, "--embedding-weights", "float32")
    weights = Bundle.open(tmp_path / "bundle").weights
    assert (weights.embedding, weights.head) == (WeightFormat("float32"), WeightFormat("int8"))
    assert {share.format for layer in weights.layers for share in layer} == {WeightFormat("int4", 32)}
    assert report["weights"] == weights.to_json()


def test_a_tied_head_shares_the_table_unless_its_format_is_another(
    tiny_checkpoint: Any, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint("llama", tie_word_embeddings=True, **SIZES)
    shared, apart = tmp_path / "shared", tmp_path / "apart"
    built(checkpoint, shared, "--weights", "int4", "--head-weights", "int8", "--kv-ratio", "1")
    built(
        checkpoint,
        apart,
        *("--weights", "int4", "--head-weights", "int8", "--embedding-weights", "int4", "--kv-ratio", "1"),
    )
    bundle = Bundle.open(shared)
    assert bundle.weights.embedding == bundle.weights.head == WeightFormat("int8")
    assert bundle.model.tie_word_embeddings is True
    bundle = Bundle.open(apart)
    assert (bundle.weights.embedding, bundle.weights.head) == (WeightFormat("int4", 64), WeightFormat("int8"))
    assert bundle.model.tie_word_embeddings is False
    for path in (shared, apart):
        assert validate_bundle(path, Progress(), "cpu").failures == ()


def test_float_weights_are_written_as_before(tiny_checkpoint: Any, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("llama", **SIZES)
    report = built(checkpoint, tmp_path / "plain", "--kv-ratio", "1")
    built(checkpoint, tmp_path / "named", "--kv-ratio", "1", "--weights", "float32")
    assert report["quantization"] is None
    for name in (GRAPH_FILE, "decoder.onnx.data"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "named" / name).read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_integer_weights_in_half_precision(dtype: str, tiny_checkpoint: Any, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("llama", tie_word_embeddings=True, **SIZES)
    report = built(checkpoint, tmp_path / "bundle", "--weights", "int4", "--dtype", dtype, "--kv-ratio", "1")
    assert report["validation"]["failures"] == []
    assert Bundle.open(tmp_path / "bundle").weights.is_quantized


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--weights", "float16"), "--weights must be int8, int4 or the data type of computation"),
        (("--head-weights", "bfloat16"), "--head-weights must be int8, int4"),
        (("--weights", "int3"), "int3"),
        (("--weight-block", "48"), "48"),
    ],
)
def test_rejects_formats_that_do_not_go_with_the_dtype(
    options: tuple[str, ...], message: str, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    code, _, err = run_kvexport("build", tiny_checkpoint("llama"), "-o", tmp_path / "bundle", *options)
    assert code == 2 and message in err
    assert not (tmp_path / "bundle").exists()


def test_gptq_loses_less_than_rounding_and_records_its_calibration(
    tiny_checkpoint: Any, tmp_path: Path
) -> None:
    checkpoint, losses = tiny_checkpoint("llama", **SIZES), dict[str, float]()
    for method in ("gptq", "nearest"):
        options = ("--weights", "int4", "--embedding-weights", "float32", "--head-weights", "float32")
        report = built(
            checkpoint,
            tmp_path / method,
            *options,
            *("--kv-ratio", "1", "--samples", "64", "--weight-method", method),
        )
        losses[method] = report["quantization"]["mean_kl"]
        assert report["weight_method"] == method
        assert (report["calibration"] is not None) == (method == "gptq")
        assert validate_bundle(tmp_path / method, Progress(), "cpu").failures == ()
    assert losses["gptq"] < 0.7 * losses["nearest"]
