"""Bundles of every family: graph, cache, compression and self-test, on tiny random checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.family_cases import DEFAULTS, VOCAB
from support.family_settings import DYNAMIC, YARN
from support.rms_family_cases import longrope

import kvexport
from kvexport.build import BuildOptions, BuildReport
from kvexport.build import build as build_bundle
from kvexport.calibrate import recipe_for
from kvexport.convert import CompressionRequest
from kvexport.errors import UsageError
from kvexport.model.loader import load_decoder
from kvexport.progress import Progress
from kvexport.runtime.self_test.verdict import self_test

LENGTH = 60  # tokens of the compared text: several windows and chunks
TinyCheckpoint = Callable[..., Path]


class Notes(Progress):
    """Keeps the messages for the user."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def build(checkpoint: Path, output: Path, ratio: float, method: str = "auto") -> BuildReport:
    recipe = recipe_for("random", samples=48, length=32)
    request = CompressionRequest(kv_ratio=ratio)
    return build_bundle(checkpoint, output, BuildOptions(recipe, request, method), Progress())


def their_logits(checkpoint: Path, tokens: np.ndarray) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(tokens), use_cache=False).logits.numpy()
    return logits


def tokens_of(length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(3).integers(0, VOCAB, (2, length))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("phi3", longrope(64, 4)),
        ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}),
        ("qwen2", {"rope_parameters": {**YARN, "original_max_position_embeddings": 64}}),
    ],
)
def test_a_capacity_that_changes_the_frequencies_of_short_texts_is_told(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, family: str, config: dict[str, Any]
) -> None:
    checkpoint, tokens = tiny_checkpoint(family, **config), tokens_of(40)
    expected = their_logits(checkpoint, tokens)
    options = BuildOptions(recipe_for("random", samples=2, length=16), CompressionRequest(kv_ratio=1), "auto")
    for capacity in (64, 65):
        notes = Notes()
        build_bundle(checkpoint, tmp_path / str(capacity), options, notes, capacity=capacity)
        told = [text for text in notes.texts if "other frequencies for texts of more than 64 tokens" in text]
        with kvexport.open(tmp_path / str(capacity)) as session:
            differs = np.abs(session.score(tokens) - expected).max() > 1e-4 * np.abs(expected).max()
        assert bool(told) == differs == (capacity == 65 and family != "qwen2")
        assert not told or "--capacity 64" in told[0]


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(DEFAULTS))
def test_an_uncompressed_bundle_gives_the_logits_of_transformers(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, family: str
) -> None:
    checkpoint = tiny_checkpoint(family)
    build(checkpoint, tmp_path / "b", 1)
    tokens = tokens_of()
    expected = their_logits(checkpoint, tokens)
    session = kvexport.open(tmp_path / "b", chunk=24)
    assert np.abs(session.score(tokens) - expected).max() < 1e-4 * np.abs(expected).max()
    prompts = [list(tokens[0, :40]), list(tokens[1, :40])]
    cache = session.new_cache(batch=2)
    session.prefill(prompts, cache=cache)
    for at in range(40, 44):
        stepped = session.step(tokens[:, at], cache=cache)
        assert np.abs(stepped - expected[:, at]).max() < 1e-4 * np.abs(expected).max()
    assert self_test(tmp_path / "b").verdict == "ok"


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.5, pytest.param(0.25, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("family", sorted(DEFAULTS))
def test_a_compressed_bundle_is_valid_and_its_error_as_predicted(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, family: str, ratio: float
) -> None:
    """The prediction is of first order; models with random weights lose more than trained ones."""
    grouped = {"num_key_value_heads": 4} if "num_key_value_heads" in DEFAULTS[family] else {}
    checkpoint = tiny_checkpoint(family, **grouped)
    kv_heads = load_decoder(checkpoint).layers[0].attention.num_kv_heads
    if kv_heads == 1:
        with pytest.raises(UsageError, match="smallest cache"):
            build(checkpoint, tmp_path / "b", ratio)
        return
    report = build(checkpoint, tmp_path / "b", ratio)
    assert report.validation is not None and not report.validation.failures
    cached = sum(layer.kv_width for layer in report.layers)
    assert cached <= ratio * sum(layer.original_kv_width for layer in report.layers)
    ratios = [
        layer.measured_error / layer.predicted_error for layer in report.layers if layer.method != "none"
    ]
    assert min(ratios) > 0.5 and max(ratios) < 2
    assert self_test(tmp_path / "b").verdict == "ok"


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(DEFAULTS))
def test_folded_keys_where_nothing_follows_the_projection(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, family: str
) -> None:
    grouped = {"num_key_value_heads": 4} if "num_key_value_heads" in DEFAULTS[family] else {}
    checkpoint = tiny_checkpoint(family, **grouped)
    attention = load_decoder(checkpoint).layers[0].attention
    if not attention.keys_fold:
        with pytest.raises(UsageError, match="--method fold needs a model without"):
            build(checkpoint, tmp_path / "b", 0.5, "fold")
    elif attention.num_kv_heads > 1:
        report = build(checkpoint, tmp_path / "b", 0.5, "fold")
        assert report.validation is not None and not report.validation.failures
        methods = {layer.method for layer in report.layers} - {"none"}  # layers without RoPE fold as "online"
        assert "fold" in methods or attention.rope is None
        assert methods <= {"fold", "online"}
