"""`kvexport validate`: exit codes, the JSON object, the table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from support.decoders import make_decoder
from support.proved_bundles import broken, edit_graph, export, node_of

from kvexport.cli import main

Run = Callable[..., tuple[object, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(*arguments) -> exit code, standard output, standard error` of `kvexport validate`."""
    monkeypatch.setattr("signal.signal", lambda *arguments: None)  # the process's handlers stay pytest's

    def call(*arguments: object) -> tuple[object, str, str]:
        code: object = 0
        try:
            main(["validate", *map(str, arguments)])
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return call


def _bundle(path: Path, dtype: str = "float32") -> Path:
    export(path, make_decoder("llama", dtype=torch.float32), dtype=dtype)
    return path


def _wrong_scale(graph: ir.Graph) -> None:
    node_of(graph, "layers.1.attention.mixed").attributes["scale"] = ir.AttrFloat32("scale", 1.0)


def _wrong_bundle(path: Path) -> Path:
    return broken(_bundle(path.with_name("sound")), path, edit_graph(_wrong_scale))


def test_a_sound_bundle_exits_with_0_and_a_table(run: Run, tmp_path: Path) -> None:
    code, out, err = run(_bundle(tmp_path / "sound"))
    assert (code, err) == (0, "")
    for kind in ("key", "value", "attention", "residual", "logits"):
        assert kind in out
    assert "ok (prefill of 32 and 64 decode steps, greedy agreement 100.0%)" in out and "FAILED" not in out


def test_a_wrong_bundle_exits_with_1_and_names_what_failed(run: Run, tmp_path: Path) -> None:
    code, out, err = run(_wrong_bundle(tmp_path / "wrong"))
    assert code == 1
    assert "FAILED" in out
    assert "is not its PyTorch twin" in err and "layers.1.attention: cosine" in err and "layers.0" not in err


def test_json_is_one_object_for_sound_and_wrong(run: Run, tmp_path: Path) -> None:
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


def test_quiet_says_nothing_of_a_sound_bundle(run: Run, tmp_path: Path) -> None:
    assert run(_bundle(tmp_path / "sound"), "--quiet") == (0, "", "")


def test_bfloat16_says_what_it_was_computed_in(run: Run, tmp_path: Path) -> None:
    code, out, _ = run(_bundle(tmp_path / "sound", dtype="bfloat16"))
    assert code == 0 and "computed in float32 (this machine has no bfloat16 kernels)" in out


def test_no_bundle_and_a_damaged_one_exit_with_2(run: Run, tmp_path: Path) -> None:
    code, out, err = run(tmp_path)
    assert (code, out) == (2, "") and "is no bundle" in err
    bundle = _bundle(tmp_path / "sound")
    (bundle / "reference.npz").unlink()
    code, out, err = run(bundle)
    assert (code, out) == (2, "") and "reference.npz" in err


def test_too_little_memory_exits_with_3(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    memory = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    code, out, err = run(_bundle(tmp_path / "sound"))
    assert (code, out) == (3, "") and "does not fit in memory" in err
