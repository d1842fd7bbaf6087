"""Tests of `kvexport lint`: unsupported nodes of a bundle for a target, and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.command_line import Ended, run_kvexport
from support.decoders import STYLES, make_decoder
from support.tiny_bundles import decoder_with_fewer_heads, write_bundle

from kvexport.devices.targets import known_targets, lowering_for, tensorrt_version


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    decoder = make_decoder(kv_heads=2, head_dim=16, dtype=torch.float32)
    return write_bundle(tmp_path_factory.mktemp("lint") / "bundle", decoder, dtype="float16")


def lint(*arguments: object) -> Ended:
    """Run `kvexport lint`: exit code, standard output, standard error."""
    return run_kvexport("lint", *arguments)


TARGETS = [target for target in known_targets() if target.engine != "onnxruntime"]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_every_target_supports_the_lowering_that_is_chosen_for_it(target: object, bundle: Path) -> None:
    """The lowering is the one of `lowering_for`, for every TensorRT version that the target can have."""
    for jetpack in (None, *target.jetpacks):  # type: ignore[attr-defined]
        arguments = ["--target", target.name, *(["--jetpack", jetpack] if jetpack else [])]  # type: ignore[attr-defined]
        code, out, err = lint(bundle, *arguments, "--json")
        report = json.loads(out)
        version = tensorrt_version(target, jetpack=jetpack)  # type: ignore[arg-type]
        assert (code, err, report["findings"]) == (0, "", [])
        assert report["lowering"] == lowering_for(target, version)  # type: ignore[arg-type]
        assert report["version"] == ".".join(map(str, version))


def test_std24_on_tensorrt_10_3_lists_every_unsupported_node(bundle: Path) -> None:
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


def test_the_table_shows_nodes_versions_and_fixes(bundle: Path) -> None:
    code, out, _ = lint(bundle, "--target", "thor-t5000", "--tensorrt", "10.14", "--lowering", "std24")
    assert code == 1
    text = " ".join(out.split())
    assert "present.0.key TensorScatter" in text and "10.15" in text and "--lowering decomposed17" in text
    assert "layers.0.attention.mixed" not in text  # TensorRT 10.14 supports it


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("lowering", ["std24", "decomposed17"])
def test_every_decoder_style_is_supported_by_the_oldest_tensorrt_of_a_lowering(
    style: str, lowering: str, tmp_path: Path
) -> None:
    bundle = write_bundle(
        tmp_path / "b", make_decoder(style, head_dim=16, dtype=torch.float32), dtype="bfloat16"
    )
    version = {"std24": "10.15", "decomposed17": "10.3"}[lowering]
    code, out, _ = lint(bundle, "--target", "orin-nx-16gb", "--tensorrt", version, "--lowering", lowering)
    assert (code, out) == (0, f"TensorRT {version} supports the bundle in the lowering {lowering}\n")


def test_notes_do_not_fail(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", make_decoder(head_dim=16, dtype=torch.float32))
    code, out, _ = lint(bundle, "--target", "rtx-4090")
    assert code == 0 and "note: no fused attention" in " ".join(out.split())


def test_a_lowering_that_is_not_used_is_reported_with_the_reason(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    decoder = decoder_with_fewer_heads(tiny_checkpoint("llama", num_key_value_heads=4))
    bundle = write_bundle(tmp_path / "b", decoder, dtype="float16")
    code, out, _ = lint(bundle, "--target", "rtx-4090")
    assert (
        code == 0
        and "in the lowering decomposed17" in out
        and "std24 is not used: 1 node is not supported" in out
    )
    code, out, _ = lint(bundle, "--target", "rtx-4090", "--lowering", "std24", "--json")
    (finding,) = [finding for finding in json.loads(out)["findings"] if not finding["note"]]
    assert (
        code == 1
        and finding["node"] == "layers.1.attention.mixed"
        and "keys are 12 wide and values 16" in finding["problem"]
    )


def test_contrib_operators_are_not_supported(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", make_decoder(head_dim=16, dtype=torch.float32), dtype="float16")
    code, out, _ = lint(bundle, "--target", "orin-nano-8gb", "--lowering", "ort-cuda", "--json")
    assert code == 1
    assert {"com.microsoft.GroupQueryAttention"} <= {
        finding["operator"] for finding in json.loads(out)["findings"]
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "cpu"], "ONNX Runtime supports every bundle"),
        (["--target", "toaster"], "the target must be a shipped target"),
        (["--target", "orin-nano-8gb", "--jetpack", "5.1"], "expected:"),
        (["--target", "orin-nano-8gb", "--tensorrt", "8.6"], "too old"),
        (["--target", "orin-nano-8gb", "--lowering", "std99"], "the lowering must be one that kvexport has"),
        ([], "--target"),
    ],
)
def test_rejects_invalid_targets_and_versions(arguments: list[str], message: str, bundle: Path) -> None:
    code, out, err = lint(bundle, *arguments)
    assert (code, out) == (2, "") and message in err


def test_needs_no_nvidia_package(bundle: Path) -> None:
    names = ("tensorrt", "tensorrt_rtx", "polygraphy", "torch", "onnxruntime")
    hidden = f"import sys; sys.modules.update(dict.fromkeys({names}))"
    script = f"{hidden}; from kvexport.cli import main; "
    script += f"main(['lint', {str(bundle)!r}, '--target', 'orin-nano-8gb'])"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
