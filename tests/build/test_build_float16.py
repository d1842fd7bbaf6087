"""float16 bundles of families with large multipliers, softcaps and norms pass validation and self-test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.family_cases import DEFAULTS

from kvexport.build import BuildOptions
from kvexport.build import build as build_bundle
from kvexport.calibrate import recipe_for
from kvexport.convert import CompressionRequest
from kvexport.progress import Progress
from kvexport.runtime.self_test.verdict import self_test

pytestmark = pytest.mark.slow

GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.015625,
    "logits_scaling": 16.0,
}
GEMMA_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
GLM_NORMS = ("post_self_attn_layernorm", "post_mlp_layernorm")
# Changes of the config; tensors that are multiplied, and by what; what float32 then computes.
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...], float, list[str]]] = {
    "gemma2": ({}, GEMMA_NORMS, 2e4, ["residual stream"]),
    "gemma3_text": ({}, GEMMA_NORMS, 3e4, ["residual stream"]),
    "glm4": ({}, GLM_NORMS, 2e4, ["residual stream"]),
    "nemotron": ({}, ("up_proj",), 400.0, ["residual stream", "layers.0.mlp", "layers.1.mlp"]),
    "granite": (GRANITE, (), 1.0, []),
    "hyperclovax": (GRANITE, (), 1.0, []),
    "cohere": ({"logit_scale": 0.0625}, (), 1.0, []),
    "cohere2": ({"logit_scale": 16.0}, (), 1.0, []),
}


def build(checkpoint: Path, output: Path) -> list[str]:
    """Build a float16 bundle without compression; what it computes in float32."""
    recipe, request = recipe_for("random", samples=12, length=32), CompressionRequest(kv_ratio=1)
    report = build_bundle(checkpoint, output, BuildOptions(recipe, request, dtype="float16"), Progress())
    assert report.validation is not None and not report.validation.failures
    return list(report.kept_float32)


@pytest.mark.parametrize("family", CASES)
def test_large_numbers(
    family: str,
    tiny_checkpoint: Callable[..., Path],
    edit_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    config, parts, factor, wide = CASES[family]

    def enlarge(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if any(part in name for part in parts):
                tensors[name] = tensors[name] * factor

    checkpoint = edit_checkpoint(tiny_checkpoint(family, **config), tensors=enlarge)
    assert build(checkpoint, tmp_path / "bundle") == wide
    assert self_test(tmp_path / "bundle").verdict == "ok"


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", sorted(DEFAULTS))
def test_every_family(family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(family)
    assert build(checkpoint, tmp_path / "bundle") == []
    assert self_test(tmp_path / "bundle").verdict == "ok"
