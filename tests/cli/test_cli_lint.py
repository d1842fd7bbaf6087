"""`kvexport lint`: what a target's TensorRT refuses of a bundle, for people and for programs, by exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.decoders import STYLES, make_decoder
from support.tiny_bundles import decoder_with_fewer_heads, write_bundle

from kvexport.cli import main
from kvexport.devices.targets import known_targets, lowering_for, tensorrt_version

Lint = Callable[..., tuple[object, str, str]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    decoder = make_decoder(kv_heads=2, head_dim=16, dtype=torch.float32)
    return write_bundle(tmp_path_factory.mktemp("lint") / "bundle", decoder, dtype="float16")


@pytest.fixture
def lint(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Lint:
    """`lint(*arguments) -> exit code, standard output, standard error`."""
    monkeypatch.setattr("signal.signal", lambda *arguments: None)  # the process's handlers stay pytest's

    def call(*arguments: object) -> tuple[object, str, str]:
        code: object = 0
        try:
            main(["lint", *map(str, arguments)])
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return call


TARGETS = [target for target in known_targets() if target.engine != "onnxruntime"]


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_each_target_gets_a_lowering_that_it_takes(target: object, lint: Lint, bundle: Path) -> None:
    """The same that `lowering_for` names, for every TensorRT that the target may have."""
    for jetpack in (None, *target.jetpacks):  # type: ignore[attr-defined]
        arguments = ["--target", target.name, *(["--jetpack", jetpack] if jetpack else [])]  # type: ignore[attr-defined]
        code, out, err = lint(bundle, *arguments, "--json")
        said = json.loads(out)
        version = tensorrt_version(target, jetpack=jetpack)  # type: ignore[arg-type]
        assert (code, err, said["findings"]) == (0, "", [])
        assert said["lowering"] == lowering_for(target, version)  # type: ignore[arg-type]
        assert said["version"] == ".".join(map(str, version))


def test_the_standard_form_on_tensorrt_10_3_lists_everything_that_is_missing(
    lint: Lint, bundle: Path
) -> None:
    code, out, err = lint(
        bundle, "--target", "orin-nano-8gb", "--jetpack", "6.2", "--lowering", "std24", "--json"
    )
    findings = json.loads(out)["findings"]
    assert code == 1 and "leave out --lowering" in err
    counts = {
        operator: sum(finding["operator"] == operator for finding in findings)
        for operator in ("", "Attention", "RotaryEmbedding", "RMSNormalization", "TensorScatter")
    }
    assert counts == {"": 1, "Attention": 2, "RotaryEmbedding": 4, "RMSNormalization": 5, "TensorScatter": 4}
    assert sum(counts.values()) == len(findings)
    by_name = {finding["node"]: finding for finding in findings}
    assert "TensorRT 10.14" in by_name["layers.1.attention.mixed"]["problem"]
    assert "decomposed17" in by_name["present.0.key"]["remedy"]


def test_the_table_names_nodes_versions_and_remedies(lint: Lint, bundle: Path) -> None:
    code, out, _ = lint(bundle, "--target", "thor-t5000", "--tensorrt", "10.14", "--lowering", "std24")
    assert code == 1
    text = " ".join(out.split())
    assert "present.0.key TensorScatter" in text and "10.15" in text and "--lowering decomposed17" in text
    assert "layers.0.attention.mixed" not in text  # which 10.14 has


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("lowering", ["std24", "decomposed17"])
def test_every_family_is_clean_where_it_should_be(
    style: str, lowering: str, lint: Lint, tmp_path: Path
) -> None:
    bundle = write_bundle(
        tmp_path / "b", make_decoder(style, head_dim=16, dtype=torch.float32), dtype="bfloat16"
    )
    version = {"std24": "10.15", "decomposed17": "10.3"}[lowering]
    code, out, _ = lint(bundle, "--target", "orin-nx-16gb", "--tensorrt", version, "--lowering", lowering)
    assert (code, out) == (0, f"TensorRT {version} takes the bundle as {lowering}\n")


def test_notes_are_no_failure(lint: Lint, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", make_decoder(head_dim=16, dtype=torch.float32))
    code, out, _ = lint(bundle, "--target", "rtx-4090")
    assert code == 0 and "note: no fused attention" in " ".join(out.split())


def test_a_lowering_that_is_passed_over_is_said(
    lint: Lint, tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    decoder = decoder_with_fewer_heads(tiny_checkpoint("llama", num_key_value_heads=4))
    bundle = write_bundle(tmp_path / "b", decoder, dtype="float16")
    code, out, _ = lint(bundle, "--target", "rtx-4090")
    assert code == 0 and "as decomposed17" in out and "std24 is passed over: 1 findings" in out
    code, out, _ = lint(bundle, "--target", "rtx-4090", "--lowering", "std24", "--json")
    (finding,) = [finding for finding in json.loads(out)["findings"] if not finding["note"]]
    assert (
        code == 1
        and finding["node"] == "layers.1.attention.mixed"
        and "keys are 12 wide and values 16" in finding["problem"]
    )


def test_contrib_operators_are_refused(lint: Lint, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", make_decoder(head_dim=16, dtype=torch.float32), dtype="float16")
    code, out, _ = lint(bundle, "--target", "orin-nano-8gb", "--lowering", "ort-cuda", "--json")
    assert code == 1
    assert {"com.microsoft.GroupQueryAttention"} <= {
        finding["operator"] for finding in json.loads(out)["findings"]
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "cpu"], "ONNX Runtime, which runs every bundle"),
        (["--target", "toaster"], "no such target"),
        (["--target", "orin-nano-8gb", "--jetpack", "5.1"], "expected:"),
        (["--target", "orin-nano-8gb", "--tensorrt", "8.6"], "too old"),
        (["--target", "orin-nano-8gb", "--lowering", "std99"], "no such lowering"),
        ([], "--target"),
    ],
)
def test_what_cannot_be_asked(arguments: list[str], words: str, lint: Lint, bundle: Path) -> None:
    code, out, err = lint(bundle, *arguments)
    assert (code, out) == (2, "") and words in err


def test_it_needs_no_tensorrt(bundle: Path) -> None:
    hidden = "import sys; sys.modules.update(dict.fromkeys(('tensorrt', 'tensorrt_rtx', 'polygraphy', 'torch', 'onnxruntime')))"
    script = f"{hidden}; from kvexport.cli import main; main(['lint', {str(bundle)!r}, '--target', 'orin-nano-8gb'])"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
