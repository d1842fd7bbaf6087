"""Tests of `kvexport validate`: exit codes, JSON and table."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from support.command_line import Ended, run_kvexport
from support.decoders import make_decoder
from support.validated_bundles import broken, edit_graph, export, node_of


def run(*arguments: object) -> Ended:
    """Run `kvexport validate`: exit code, standard output, standard error."""
    return run_kvexport("validate", *arguments)


def _bundle(path: Path, dtype: str = "float32") -> Path:
    export(path, make_decoder("llama", dtype=torch.float32), dtype=dtype)
    return path


def _wrong_scale(graph: ir.Graph) -> None:
    node_of(graph, "layers.1.attention.mixed").attributes["scale"] = ir.AttrFloat32("scale", 1.0)


def _wrong_bundle(path: Path) -> Path:
    return broken(_bundle(path.with_name("correct")), path, edit_graph(_wrong_scale))


def test_a_correct_bundle_exits_with_0_and_prints_a_table(tmp_path: Path) -> None:
    code, out, err = run(_bundle(tmp_path / "correct"))
    assert (code, err) == (0, "")
    for kind in ("key", "value", "attention", "residual", "logits"):
        assert kind in out
    assert (
        "ok (prefill of 32 tokens and 64 decode steps, greedy agreement 100.0%)" in out
        and "FAILED" not in out
    )


def test_a_wrong_bundle_exits_with_1_and_names_the_outputs_that_differ(tmp_path: Path) -> None:
    code, out, err = run(_wrong_bundle(tmp_path / "wrong"))
    assert code == 1
    assert "FAILED" in out
    assert (
        "does not match its PyTorch reference" in err
        and "layers.1.attention: cosine" in err
        and "layers.0" not in err
    )


def test_json_is_one_object_for_correct_and_wrong_bundles(tmp_path: Path) -> None:
    for wanted, make in ((0, _bundle), (1, _wrong_bundle)):
        code, out, _ = run(make(tmp_path / str(wanted)), "--json")
        report = json.loads(out)
        assert code == wanted == bool(report["failures"])
        assert (report["prefill"], report["steps"], report["dtype"]) == (32, 64, "float32")
        assert [each["name"] for each in report["differences"]][:3] == [
            "logits",
            "layers.0.key",
            "layers.0.value",
        ]
        assert {"cosine", "norm_ratio", "max_error", "failed"} <= report["differences"][0].keys()
        assert {"greedy_agreement", "gate", "computed_in"} <= report.keys()


def test_quiet_prints_nothing_for_a_correct_bundle(tmp_path: Path) -> None:
    assert run(_bundle(tmp_path / "correct"), "--quiet") == (0, "", "")


def test_a_bfloat16_bundle_reports_the_dtype_of_the_computation(tmp_path: Path) -> None:
    code, out, _ = run(_bundle(tmp_path / "correct", dtype="bfloat16"))
    assert code == 0 and "computed in float32 (this machine has no bfloat16 kernels)" in out


def test_a_missing_or_damaged_bundle_exits_with_2(tmp_path: Path) -> None:
    code, out, err = run(tmp_path)
    assert (code, out) == (2, "") and "must be a bundle" in err
    bundle = _bundle(tmp_path / "correct")
    (bundle / "reference.npz").unlink()
    code, out, err = run(bundle)
    assert (code, out) == (2, "") and "reference.npz" in err


def test_too_little_memory_exits_with_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    memory = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    code, out, err = run(_bundle(tmp_path / "correct"))
    assert (code, out) == (3, "") and "does not fit in memory" in err
