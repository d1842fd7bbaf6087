"""Builds, checkpoints and statistics that are made on another device are those of the CPU.

Float32 products are rounded otherwise there. The tolerance allows a hundred times the differences that were
measured on the simulated device; `benchmarks/gpu` has the same for real GPUs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.torch_device import take_for_cuda

from kvexport.analyze import analyze
from kvexport.build import BuildOptions, BuildReport, build, calibrate, compress, conversion_job
from kvexport.bundle import Bundle
from kvexport.calibrate import recipe_for
from kvexport.convert import CompressionRequest
from kvexport.model import reference
from kvexport.model.loader import load_decoder
from kvexport.model.placement import place
from kvexport.progress import Progress

RECIPE = recipe_for("random", 8, 24)
PLAN = ("method", "num_key_value_heads", "key_head_dim", "value_head_dim")
ERRORS = ("predicted_error", "measured_error", "residual_error")
RELATIVE = 1e-3
Checkpoints = Callable[..., Path]


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    take_for_cuda(monkeypatch, device)


def options(device: str, **others: Any) -> BuildOptions:
    return BuildOptions(RECIPE, CompressionRequest(kv_ratio=0.5), **others, device=device)


def require_equal(here: BuildReport, there: BuildReport) -> None:
    assert (here.device, there.device) == ("cpu", "simulated:0")
    for a, b in zip(here.layers, there.layers, strict=True):
        assert [getattr(a, name) for name in PLAN] == [getattr(b, name) for name in PLAN]
        for name in ERRORS:
            assert getattr(b, name) == pytest.approx(getattr(a, name), rel=RELATIVE)
    assert here.divergence is not None and there.divergence is not None
    assert there.divergence.mean_kl == pytest.approx(here.divergence.mean_kl, rel=RELATIVE)


@pytest.mark.parametrize("family", ["llama", "qwen3", "bloom"])
def test_a_bundle_is_that_of_the_cpu(tiny_checkpoint: Checkpoints, tmp_path: Path, family: str) -> None:
    source = tiny_checkpoint(family, **{} if family == "bloom" else {"num_key_value_heads": 4})
    here, there = (
        build(source, tmp_path / name, options(name), Progress(), capacity=64) for name in ("cpu", "cuda")
    )
    require_equal(here, there)
    assert there.validation is not None and not there.validation.failures
    assert (tmp_path / "cpu/decoder.onnx").read_bytes() == (tmp_path / "cuda/decoder.onnx").read_bytes()
    logits = [np.load(tmp_path / name / "reference.npz")["logits"] for name in ("cpu", "cuda")]
    assert np.abs(logits[0] - logits[1]).max() < RELATIVE * np.abs(logits[0]).max()
    calibration = Bundle.open(tmp_path / "cuda").calibration
    assert calibration is not None and calibration["device"] == "simulated:0"
    assert json.loads((tmp_path / "cuda/report.json").read_text())["device"] == "simulated:0"


def test_a_healed_bundle_is_that_of_the_cpu(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", num_key_value_heads=4)
    here, there = (
        build(source, tmp_path / name, options(name, heal=5), Progress(), capacity=64)
        for name in ("cpu", "cuda")
    )
    require_equal(here, there)
    assert here.healing is not None and there.healing is not None
    assert there.healing.kl_after == pytest.approx(here.healing.kl_after, rel=1e-2)


def test_a_model_that_is_not_compressed_is_copied(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    request = CompressionRequest(kv_ratio=1)
    for name in ("cpu", "cuda"):
        build(
            tiny_checkpoint("llama"),
            tmp_path / name,
            replace(options(name), request=request),
            Progress(),
            capacity=64,
        )
    for file in ("decoder.onnx", "decoder.onnx.data"):
        assert (tmp_path / "cpu" / file).read_bytes() == (tmp_path / "cuda" / file).read_bytes()


def test_a_checkpoint_is_that_of_the_cpu(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", num_key_value_heads=4)
    here, there = (
        compress(source, tmp_path / name, options(name, method="fold"), Progress())
        for name in ("cpu", "cuda")
    )
    require_equal(here, there)
    tokens = torch.arange(20)[None]
    logits = [reference.forward(load_decoder(tmp_path / name), tokens) for name in ("cpu", "cuda")]
    assert float((logits[0] - logits[1]).abs().max()) < RELATIVE * float(logits[0].abs().max())


def test_statistics_of_one_device_serve_another(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", num_key_value_heads=4)
    calibrate(source, tmp_path / "statistics", RECIPE, Progress(), capacity=64, device="cuda")
    direct = build(source, tmp_path / "direct", options("cpu"), Progress(), capacity=64)
    saved = options("cuda", statistics=tmp_path / "statistics")
    require_equal(direct, build(source, tmp_path / "saved", saved, Progress(), capacity=64))


def test_an_analysis_is_that_of_the_cpu(tiny_checkpoint: Checkpoints) -> None:
    source = tiny_checkpoint("llama", num_key_value_heads=4)
    here, there = (analyze(source, options(name), Progress(), tokens=12) for name in ("cpu", "cuda"))
    assert there.divergence.mean_kl == pytest.approx(here.divergence.mean_kl, rel=RELATIVE)
    assert (here.token_ids, here.kv_ratio) == (there.token_ids, there.kv_ratio)
    assert here.sensitivity is not None and there.sensitivity is not None
    for a, b in zip(here.sensitivity, there.sensitivity, strict=True):
        assert (b["key"], b["value"]) == pytest.approx((a["key"], a["value"]), rel=RELATIVE)


def test_layers_that_are_not_moved_fail(
    tiny_checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        conversion_job,
        "place",
        lambda decoder, device: replace(place(decoder, device), layers=decoder.layers),
    )
    with pytest.raises(RuntimeError, match="on the same device"):
        build(tiny_checkpoint("llama"), tmp_path / "bundle", options("cuda"), Progress(), capacity=64)
    assert list(tmp_path.iterdir()) == []
