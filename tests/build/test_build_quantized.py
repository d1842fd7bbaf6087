"""Builds with integer weights: formats, exact validation, and the loss that is reported apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.command_line import run_kvexport
from support.quantized_checkpoints import SIZES
from support.validated_bundles import broken, edit_weight

from kvexport.build.report import WeightBits
from kvexport.bundle import Bundle
from kvexport.bundle.formats import WeightFormat
from kvexport.cli.report import _weight_bits_line
from kvexport.graph import GRAPH_FILE
from kvexport.plan import plan
from kvexport.progress import Progress
from kvexport.runtime import open_bundle
from kvexport.runtime.self_test.verdict import self_test
from kvexport.validate import validate_bundle

ALL_IN_4_BITS = ("--weight-bits", "4.501")  # least possible
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
    options = ("--weights", name, "--kv-heads", "1", *(ALL_IN_4_BITS if name == "int4" else ()))
    report = built(tiny_checkpoint("llama", **SIZES), tmp_path / "bundle", *options)
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
        if method == "gptq":
            options += ALL_IN_4_BITS
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


MIXED = ("--weights", "int4", "--kv-ratio", "1", "--samples", "64")


def bits_of(path: Path) -> set[str]:
    return {each.format for each in Bundle.open(path).weights.formats}


@pytest.mark.slow
def test_the_most_sensitive_weights_get_8_bits(tiny_checkpoint: Any, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("llama", tie_word_embeddings=True, **SIZES)
    ends = {}
    for name, options in {"fewest": ALL_IN_4_BITS, "most": ("--weight-bits", "9")}.items():
        ends[name] = built(checkpoint, tmp_path / name, *MIXED, *options)
    assert ends["fewest"]["weight_bits"]["eight_bits"] == []
    assert len(ends["most"]["weight_bits"]["eight_bits"]) == 2 * 7 + 1
    assert bits_of(tmp_path / "fewest") == {"int4"} and bits_of(tmp_path / "most") == {"int8"}
    least, most = (ends[name]["weight_bits"] for name in ("most", "fewest"))
    kl = (least["predicted_kl"] * most["predicted_kl"]) ** 0.5
    for name, options in {"bits": ("--weight-bits", "5.7"), "kl": ("--weight-max-kl", str(kl))}.items():
        report = built(checkpoint, tmp_path / name, *MIXED, *options)
        chosen, loss = report["weight_bits"], report["quantization"]["mean_kl"]
        assert most["bytes"] < chosen["bytes"] < least["bytes"]
        assert least["predicted_kl"] < chosen["predicted_kl"] < most["predicted_kl"]
        assert ends["most"]["quantization"]["mean_kl"] < loss < ends["fewest"]["quantization"]["mean_kl"]
        assert 1 / 3 < chosen["predicted_kl"] / loss < 3
        assert (chosen["bits"] <= 5.7) if name == "bits" else (chosen["predicted_kl"] <= kl)
        names = {each.partition(".")[2] or each for each in chosen["eight_bits"]}
        assert names <= {"q", "k", "v", "o", "gate", "up", "down", "embedding"}
        assert "weight-analysis" in report["seconds"]
        assert bits_of(tmp_path / name) == {"int4", "int8"}
    stored = (tmp_path / "bits" / "decoder.onnx.data").stat().st_size
    planned = plan(checkpoint, None, dtype="float32", weights=["int4"], weight_bits=5.7).rows[0]
    assert planned.memory.weights == pytest.approx(stored, rel=0.05)  # in steps of one small map
    assert validate_bundle(tmp_path / "kl", Progress(), "cpu").failures == ()
    assert Bundle.open(tmp_path / "kl").model.tie_word_embeddings is True


def test_a_loss_out_of_reach_is_refused(tiny_checkpoint: Any, tmp_path: Path) -> None:
    code, _, err = run_kvexport(
        "build",
        tiny_checkpoint("llama", **SIZES),
        *("-o", tmp_path / "no"),
        *(*OPTIONS, *MIXED, "--weight-max-kl", "1e-9"),
    )
    assert code == 2 and "--weight-max-kl must be reachable in 8 bits" in err and "at least" in err
    assert not (tmp_path / "no").exists()


def test_given_formats_are_no_part_of_the_choice(tiny_checkpoint: Any, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("llama", **SIZES)
    options = (*MIXED, "--weight-bits", "9", "--head-weights", "int4", "--embedding-weights", "float32")
    report = built(checkpoint, tmp_path / "bundle", *options)
    weights = Bundle.open(tmp_path / "bundle").weights
    assert (weights.head, weights.embedding) == (WeightFormat("int4", 64), WeightFormat("float32"))
    assert not {"head", "embedding"} & {*report["weight_bits"]["eight_bits"]}
    plain = built(checkpoint, tmp_path / "plain", *MIXED, "--weight-method", "nearest")
    assert plain["weight_bits"] is None and bits_of(tmp_path / "plain") == {"int4"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--weights", "int4", "--weight-bits", "4.3"), "expected: at least 4.501"),
        (("--weights", "int4", "--weight-bits", "5", "--weight-max-kl", "1"), "must not be given together"),
        (("--weights", "int4", "--weight-bits", "nan"), "--weight-bits must be a finite number > 0"),
        (("--weights", "int4", "--weight-max-kl", "0"), "--weight-max-kl must be a finite number > 0"),
        (("--weights", "int8", "--weight-bits", "5"), "must be given with --weights int4"),
        (("--weight-max-kl", "5"), "must be given with --weights int4"),
        (("--weights", "int4", "--weight-method", "nearest", "--weight-bits", "5"), "--weight-method that"),
    ],
)
def test_rejects_bits_that_cannot_be(
    options: tuple[str, ...], message: str, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint("llama", **SIZES)
    code, _, err = run_kvexport("build", checkpoint, "-o", tmp_path / "bundle", *OPTIONS, *options)
    assert code == 2 and message in " ".join(err.split()), err
    assert not (tmp_path / "bundle").exists()


def test_the_summary_names_the_weights_in_8_bits() -> None:
    line = _weight_bits_line(WeightBits(("0.v", "3.down", "head"), 0.0123456, 4.987, 1000))
    assert line == (
        "4.99 bits a weight, scales included: head and 2 linear maps in 8 bits, predicted mean KL 0.01235"
    )
    assert "no weights in 8 bits" in _weight_bits_line(WeightBits((), 0.1, 4.5, 1000))
