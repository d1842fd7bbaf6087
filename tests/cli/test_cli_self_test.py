"""Tests of `kvexport self-test`: exit codes, JSON and table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.command_line import Ended, run_kvexport
from support.decoders import make_decoder
from support.tiny_bundles import write_bundle
from support.validated_bundles import broken


def run(*arguments: object) -> Ended:
    """Run `kvexport self-test`: exit code, standard output, standard error."""
    return run_kvexport("self-test", *arguments)


@pytest.fixture(scope="module")
def correct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(
        tmp_path_factory.mktemp("correct") / "b", make_decoder(dtype=torch.float32), self_test=True
    )


@pytest.fixture(scope="module")
def mixed(correct: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose self-test was recorded with other weights."""

    def change(bundle: Path) -> None:
        raw = json.loads((bundle / "self_test.json").read_text())
        (bundle / "self_test.json").write_text(json.dumps({**raw, "weights_sha256": "0" * 64}))

    return broken(correct, tmp_path_factory.mktemp("mixed") / "b", change)


@pytest.fixture(scope="module")
def wrong_row(correct: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose self-test has one wrong number."""

    def change(bundle: Path) -> None:
        raw = json.loads((bundle / "self_test.json").read_text())
        raw["rows"][20]["key_norms"][1] *= 2
        (bundle / "self_test.json").write_text(json.dumps(raw))

    return broken(correct, tmp_path_factory.mktemp("wrong-row") / "b", change)


def test_a_correct_bundle_exits_with_0_and_prints_a_table(correct: Path) -> None:
    code, out, err = run(correct)
    assert (code, err) == (0, "")
    assert "at once" in out and "step by step" in out and "tolerance" in out and "FAILED" not in out
    assert "ok (24 of 24 generated tokens as in PyTorch; onnxruntime" in out


def test_a_wrong_bundle_exits_with_1_and_a_fix(mixed: Path, wrong_row: Path) -> None:
    code, out, err = run(mixed)
    assert (code, out.startswith("weights (")) == (1, True)
    assert "weights: decoder.onnx.data differs from that of the self-test" in err and "fix:" in err
    code, out, err = run(wrong_row, "--provider", "cpu")
    assert code == 1 and out.count("FAILED") == 2
    assert "first difference: token 20, key of layer 1" in err


def test_json_is_one_object(correct: Path, mixed: Path, wrong_row: Path) -> None:
    for bundle, verdict, checks in ((correct, "ok", 2), (mixed, "weights", 0), (wrong_row, "weights", 2)):
        code, out, _ = run(bundle, "--json")
        report = json.loads(out)
        assert (report["verdict"], len(report["checks"]), code) == (verdict, checks, int(verdict != "ok"))
        assert (report["provider"], report["dtype"]) == ("cpu", "float32")
        assert set(report["tolerance"]) == {
            "logits",
            "norms",
            "tie",
        }
        assert report["engine"].startswith("onnxruntime") and (report["fix"] is None) == (verdict == "ok")
    assert report["checks"][0]["first"] == {"row": 20, "layer": 1, "part": "key"}


def test_quiet_prints_nothing_for_a_correct_bundle(correct: Path, mixed: Path) -> None:
    assert run(correct, "--quiet") == (0, "", "")
    code, out, err = run(mixed, "--quiet")
    assert (code, out) == (1, "") and "weights" in err


def test_missing_and_damaged_bundles_exit_with_2_and_missing_hardware_with_3(
    correct: Path, tmp_path: Path
) -> None:
    code, out, err = run(tmp_path)
    assert (code, out) == (2, "") and "must be a bundle" in err
    damaged = broken(correct, tmp_path / "b", lambda bundle: None)
    data = bytearray((damaged / "decoder.onnx.data").read_bytes())
    data[1000] ^= 1
    (damaged / "decoder.onnx.data").write_bytes(data)
    code, out, err = run(damaged)
    assert (code, out) == (2, "") and "must be unchanged" in err
    code, out, err = run(correct, "--provider", "tensorrt")
    assert (code, out) == (3, "")
    half = write_bundle(
        tmp_path / "half", make_decoder(layers=1, dtype=torch.float32), dtype="bfloat16", self_test=True
    )
    code, out, err = run(half)
    assert (code, out) == (3, "") and "bfloat16" in err
