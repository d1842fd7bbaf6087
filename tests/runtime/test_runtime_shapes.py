"""A built bundle with layers of different shapes generates what the converted model does in PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvexport.build import BuildHooks, BuildOptions, BuildReport, build
from kvexport.bundle import Bundle
from kvexport.calibrate import recipe_for
from kvexport.convert import CompressionPlan, CompressionRequest, methods_for
from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer
from kvexport.model.loader import load_decoder
from kvexport.progress import Progress
from kvexport.runtime import open_bundle

SIZES: dict[str, Any] = {"num_key_value_heads": 4, "num_hidden_layers": 4}
PROMPTS = [[5, 9, 33], [1], list(range(20))]


def built(
    checkpoint: Path,
    bundle: Path,
    plan: Callable[[CompressionPlan], CompressionPlan] = lambda plan: plan,
    **options: Any,
) -> tuple[BuildReport, Decoder]:
    """The report, and the converted model."""
    layers: list[Layer] = []

    def record(layer: Layer) -> Layer:
        layers.append(layer)
        return layer

    build_options = BuildOptions(recipe_for("random", 16, 24), **options)
    hooks = BuildHooks(plan=plan, graph_layer=record)
    report = build(checkpoint, bundle, build_options, Progress(), capacity=64, hooks=hooks)
    return report, dataclasses.replace(load_decoder(checkpoint), layers=layers)


def logits(decoder: Decoder, ids: list[int]) -> Tensor:
    """[S, vocab]"""
    return reference.forward(decoder, torch.tensor([ids]))[0]


def greedy(decoder: Decoder, prompt: list[int], steps: int) -> tuple[int, ...]:
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(logits(decoder, ids)[-1].argmax()))
    return tuple(ids[len(prompt) :])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"request": CompressionRequest(kv_ratio=0.4)}),
        ("llama", {"request": CompressionRequest(kv_ratio=0.4, equal_widths=False)}),
        ("qwen2", {"request": CompressionRequest(kv_ratio=0.6, equal_widths=False), "method": "fold"}),
        ("qwen3", {"request": CompressionRequest(kv_ratio=0.45)}),
    ],
    ids=["equal widths", "unequal widths", "folded", "normalised keys"],
)
def test_built_bundle_equals_the_converted_model(
    family: str,
    options: dict[str, Any],
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    report, decoder = built(tiny_checkpoint(family, **SIZES), tmp_path / "b", **options)
    shapes = [
        (layer.num_key_value_heads, layer.key_head_dim, layer.value_head_dim) for layer in report.layers
    ]
    assert len(set(shapes)) > 1, "all layers of one shape: no test of mixed ones"
    assert max(max(key, value) for _, key, value in shapes) > 8  # wider than a trained head
    session = open_bundle(tmp_path / "b", threads=1)
    assert [
        (each.num_key_value_heads, each.key_head_dim, each.value_head_dim) for each in session.bundle.layers
    ] == shapes
    expected = [greedy(decoder, prompt, 10) for prompt in PROMPTS]
    assert [made.token_ids for made in session.generate(PROMPTS, max_new_tokens=10, stop=())] == expected
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        ids = [*prompt, *tokens]
        np.testing.assert_allclose(session.score([ids])[0], logits(decoder, ids), rtol=0, atol=2e-4)
    per_token = sum(heads * (key + value) for heads, key, value in shapes) * 4
    session.prefill(PROMPTS[0])
    assert session.memory().bytes_per_token == report.kv_bytes_per_token == per_token
    assert list(Bundle.open(tmp_path / "b").layers) == report.layers
    trained = load_decoder(tiny_checkpoint(family, **SIZES))
    assert [
        greedy(trained, prompt, 10) for prompt in PROMPTS
    ] != expected  # a control: conversion changed something


@pytest.mark.slow
def test_auto_mixes_methods_in_one_bundle(
    tiny_checkpoint: Callable[..., Path],
    edit_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """A model in which the keys of one layer fold without loss."""

    def alternate(plan: CompressionPlan) -> CompressionPlan:
        """The plan with the methods fold and online alternating."""
        methods = methods_for("auto", load_decoder(source).layers[0].attention)
        by_name = {method.name: method for method in methods}
        layer_plans = [
            dataclasses.replace(layer_plan, method=by_name[("fold", "online")[index % 2]])
            for index, layer_plan in enumerate(plan.layer_plans)
        ]
        return dataclasses.replace(plan, layer_plans=layer_plans)

    source = tiny_checkpoint("llama", **SIZES)
    report, decoder = built(source, tmp_path / "b", alternate, request=CompressionRequest(kv_ratio=0.4))
    assert [layer.method for layer in report.layers] == ["fold", "online"] * 2
    assert (
        torch.is_tensor(decoder.layers[0].attention.frequencies)
        and decoder.layers[1].attention.frequencies is None
    )
    made = open_bundle(tmp_path / "b", threads=1).generate(PROMPTS, max_new_tokens=10, stop=())
    assert [each.token_ids for each in made] == [greedy(decoder, prompt, 10) for prompt in PROMPTS]
