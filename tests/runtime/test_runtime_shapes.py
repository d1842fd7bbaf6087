"""A bundle that `build` made, with layers of different shapes, generates what the converted model does in PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvexport.build import conversion_job as job
from kvexport.build import pipeline as building
from kvexport.bundle.bundle import Bundle
from kvexport.calibrate import recipe_for
from kvexport.convert import CompressionRequest
from kvexport.graph import DecoderWriter
from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer
from kvexport.model.loader import load_decoder
from kvexport.progress import Progress
from kvexport.runtime import open_bundle

SIZES: dict[str, Any] = {"num_key_value_heads": 4, "num_hidden_layers": 4}
PROMPTS = [[5, 9, 33], [1], list(range(20))]


def built(
    checkpoint: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, **plan: Any
) -> tuple[building.BuildReport, Decoder]:
    """The report, and the converted model as its layers were handed to the graph."""
    layers: list[Layer] = []
    original = DecoderWriter.add_layer
    monkeypatch.setattr(
        DecoderWriter, "add_layer", lambda self, layer: layers.append(layer) or original(self, layer)
    )
    made = building.BuildOptions(recipe_for("random", 16, 24), **plan)
    report = building.build(checkpoint, bundle, made, Progress(), capacity=64)
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
    ("family", "plan"),
    [
        ("llama", {"request": CompressionRequest(kv_ratio=0.4)}),
        ("llama", {"request": CompressionRequest(kv_ratio=0.4, equal_widths=False)}),
        ("qwen2", {"request": CompressionRequest(kv_ratio=0.6, equal_widths=False), "method": "fold"}),
        ("qwen3", {"request": CompressionRequest(kv_ratio=0.45)}),
    ],
    ids=["equal widths", "unequal widths", "folded", "normalised keys"],
)
def test_a_built_bundle_generates_what_the_converted_model_does(
    family: str,
    plan: dict[str, Any],
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report, decoder = built(tiny_checkpoint(family, **SIZES), tmp_path / "b", monkeypatch, **plan)
    shapes = [
        (layer.num_key_value_heads, layer.key_head_dim, layer.value_head_dim) for layer in report.layers
    ]
    assert len(set(shapes)) > 1, "all layers of one shape: no test of mixed ones"
    assert max(max(key, value) for _, key, value in shapes) > 8  # wider than a trained head
    session = open_bundle(tmp_path / "b", threads=1)
    assert [
        (each.num_key_value_heads, each.key_head_dim, each.value_head_dim) for each in session.bundle.layers
    ] == shapes
    wanted = [greedy(decoder, prompt, 10) for prompt in PROMPTS]
    assert [made.token_ids for made in session.generate(PROMPTS, max_new_tokens=10, stop=())] == wanted
    for prompt, tokens in zip(PROMPTS, wanted, strict=True):
        ids = [*prompt, *tokens]
        np.testing.assert_allclose(session.score([ids])[0], logits(decoder, ids), rtol=0, atol=2e-4)
    per_token = sum(heads * (key + value) for heads, key, value in shapes) * 4
    session.prefill(PROMPTS[0])
    assert session.memory().bytes_per_token == report.kv_bytes_per_token == per_token
    assert list(Bundle.open(tmp_path / "b").layers) == report.layers
    trained = load_decoder(tiny_checkpoint(family, **SIZES))
    assert [
        greedy(trained, prompt, 10) for prompt in PROMPTS
    ] != wanted  # a control: conversion changed something


@pytest.mark.slow
def test_auto_gives_layers_of_either_method_to_one_bundle(
    tiny_checkpoint: Callable[..., Path],
    edit_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model in which one layer's keys fold without loss, and whose other layers are left to the survey."""
    layer_plans = job.choose

    def either(*arguments: Any) -> Any:
        """What `choose` says, with every second layer folded."""
        found = layer_plans(*arguments)
        fold, online = (next(m for m in arguments[3] if m.name == name) for name in ("fold", "online"))
        mixed = [
            dataclasses.replace(way, method=(fold, online)[at % 2])
            for at, way in enumerate(found.layer_plans)
        ]
        return dataclasses.replace(found, layer_plans=mixed)

    monkeypatch.setattr(job, "choose", either)
    report, decoder = built(
        tiny_checkpoint("llama", **SIZES),
        tmp_path / "b",
        monkeypatch,
        request=CompressionRequest(kv_ratio=0.4),
    )
    assert [layer.method for layer in report.layers] == ["fold", "online"] * 2
    assert (
        torch.is_tensor(decoder.layers[0].attention.frequencies)
        and decoder.layers[1].attention.frequencies is None
    )
    made = open_bundle(tmp_path / "b", threads=1).generate(PROMPTS, max_new_tokens=10, stop=())
    assert [each.token_ids for each in made] == [greedy(decoder, prompt, 10) for prompt in PROMPTS]
