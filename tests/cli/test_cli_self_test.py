"""`kvexport self-test`: exit codes, the JSON object, the table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.decoders import make_decoder
from support.proved_bundles import broken
from support.tiny_bundles import write_bundle

from kvexport.cli import main

Run = Callable[..., tuple[object, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(*arguments) -> exit code, standard output, standard error` of `kvexport self-test`."""
    monkeypatch.setattr("signal.signal", lambda *arguments: None)  # the process's handlers stay pytest's

    def call(*arguments: object) -> tuple[object, str, str]:
        code: object = 0
        try:
            main(["self-test", *map(str, arguments)])
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(
        tmp_path_factory.mktemp("sound") / "b", make_decoder(dtype=torch.float32), self_test=True
    )


@pytest.fixture(scope="module")
def wrong(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of one bundle, self-test of another."""

    def change(bundle: Path) -> None:
        raw = json.loads((bundle / "self_test.json").read_text())
        (bundle / "self_test.json").write_text(json.dumps({**raw, "weights_sha256": "0" * 64}))

    return broken(sound, tmp_path_factory.mktemp("wrong") / "b", change)


@pytest.fixture(scope="module")
def other(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A row of the self-test that nothing computes."""

    def change(bundle: Path) -> None:
        raw = json.loads((bundle / "self_test.json").read_text())
        raw["rows"][20]["key_norms"][1] *= 2
        (bundle / "self_test.json").write_text(json.dumps(raw))

    return broken(sound, tmp_path_factory.mktemp("other") / "b", change)


def test_a_sound_bundle_exits_with_0_and_a_table(run: Run, sound: Path) -> None:
    code, out, err = run(sound)
    assert (code, err) == (0, "")
    assert "at once" in out and "step by step" in out and "allowed" in out and "FAILED" not in out
    assert "ok (generated 24 of 24 tokens as PyTorch; onnxruntime" in out


def test_a_wrong_one_exits_with_1_and_says_what_to_do(run: Run, wrong: Path, other: Path) -> None:
    code, out, err = run(wrong)
    assert (code, out.startswith("weights (")) == (1, True)
    assert "weights: decoder.onnx.data is not what the self-test was recorded with" in err and "fix:" in err
    code, out, err = run(other, "--provider", "cpu")
    assert code == 1 and out.count("FAILED") == 2
    assert "first wrong: token 20, key of layer 1" in err


def test_json_is_one_object(run: Run, sound: Path, wrong: Path, other: Path) -> None:
    for bundle, verdict, checks in ((sound, "ok", 2), (wrong, "weights", 0), (other, "weights", 2)):
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


def test_quiet_says_nothing_of_a_sound_bundle(run: Run, sound: Path, wrong: Path) -> None:
    assert run(sound, "--quiet") == (0, "", "")
    code, out, err = run(wrong, "--quiet")
    assert (code, out) == (1, "") and "weights" in err


def test_no_bundle_a_damaged_one_and_no_hardware(run: Run, sound: Path, tmp_path: Path) -> None:
    code, out, err = run(tmp_path)
    assert (code, out) == (2, "") and "is no bundle" in err
    damaged = broken(sound, tmp_path / "b", lambda bundle: None)
    data = bytearray((damaged / "decoder.onnx.data").read_bytes())
    data[1000] ^= 1
    (damaged / "decoder.onnx.data").write_bytes(data)
    code, out, err = run(damaged)
    assert (code, out) == (2, "") and "not as it was written" in err
    code, out, err = run(sound, "--provider", "tensorrt")
    assert (code, out) == (3, "")
    half = write_bundle(
        tmp_path / "half", make_decoder(layers=1, dtype=torch.float32), dtype="bfloat16", self_test=True
    )
    code, out, err = run(half)
    assert (code, out) == (3, "") and "bfloat16" in err
