"""`kvexport build --demo --weights int4`: the bundle writes a story that the float model finds likely."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.command_line import run_kvexport
from support.validated_bundles import broken, edit_weight
from tokenizers import Tokenizer

from kvexport.bundle import Bundle
from kvexport.files.resources import resource
from kvexport.model import reference
from kvexport.model.loader import load_decoder
from kvexport.runtime import open_bundle
from kvexport.runtime.self_test.verdict import self_test

pytestmark = pytest.mark.slow

PROMPT = "Once upon a time"
LENGTH = 100  # tokens of a story
MAX_LOSS = 0.5  # nats per token by which the story may be less likely than the float model's own; is 0.03
MIN_DISTINCT = 0.5  # share of different trigrams; that of the float model's story is 0.8

FAST = ("--calibration", "self", "--samples", "8", "--no-cache", "--json")


class FloatModel:
    """The demo model in float32."""

    def __init__(self) -> None:
        folder = resource("models", "demo")
        self._decoder = load_decoder(Path(str(folder)))
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.prompt = self.encode(PROMPT)
        self.story = self._greedy(LENGTH)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def log_likelihood(self, story: Sequence[int]) -> float:
        """Mean log-probability of the tokens of a story after the prompt, in nats."""
        logits = self._logits([*self.prompt, *story])[len(self.prompt) - 1 : -1]
        return float(logits.log_softmax(-1)[torch.arange(len(story)), torch.tensor(story)].mean())

    def loss(self, story: Sequence[int]) -> float:
        """Nats per token by which a story is less likely than the model's own."""
        return self.log_likelihood(self.story) - self.log_likelihood(story)

    def _logits(self, ids: Sequence[int]) -> torch.Tensor:
        cache = reference.new_cache(self._decoder.layers, 1, len(ids), torch.float32)
        with torch.no_grad():
            return reference.forward(self._decoder, torch.tensor([ids]), torch.arange(len(ids))[None], cache)[
                0
            ]

    def _greedy(self, count: int) -> list[int]:
        ids = list(self.prompt)
        for _ in range(count):
            ids.append(int(self._logits(ids)[-1].argmax()))
        return ids[len(self.prompt) :]


def distinct(story: Sequence[int]) -> float:
    """Share of different trigrams."""
    trigrams = [tuple(story[at : at + 3]) for at in range(len(story) - 2)]
    return len(set(trigrams)) / len(trigrams)


@pytest.fixture(scope="module")
def float_model() -> FloatModel:
    return FloatModel()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The demo bundle with int4 weights, and the report of its build."""
    bundle = tmp_path_factory.mktemp("demo") / "bundle"
    code, out, err = run_kvexport("build", "--demo", "-o", bundle, "--weights", "int4", *FAST)
    assert code == 0, err
    return bundle, json.loads(out)


def story_of(bundle: Path) -> list[int]:
    """What a bundle writes after the prompt, greedily; the end-of-sequence token is left out."""
    session = open_bundle(bundle, provider="cpu")
    return list(session.generate(PROMPT, max_new_tokens=LENGTH).token_ids)


def test_the_demo_in_int4_is_validated_and_tested(built: tuple[Path, dict[str, Any]]) -> None:
    bundle, report = built
    assert report["validation"]["failures"] == []
    assert self_test(bundle, "cpu").verdict == "ok"
    assert any(each.format == "int4" for each in Bundle.open(bundle).weights.formats)
    code, out, err = run_kvexport("run", bundle, "--prompt", PROMPT, "--max-new-tokens", "20")
    assert code == 0 and out.startswith(PROMPT), err


def test_the_story_in_int4_is_likely_in_float(
    built: tuple[Path, dict[str, Any]], float_model: FloatModel
) -> None:
    story = story_of(built[0])
    assert len(story) > 40
    assert float_model.loss(story) < MAX_LOSS and distinct(story) > MIN_DISTINCT


def test_other_text_is_less_likely_or_repeats_itself(
    built: tuple[Path, dict[str, Any]], float_model: FloatModel, tmp_path: Path
) -> None:
    """The negative controls of the test above."""
    generator, story = np.random.default_rng(0), story_of(built[0])
    for words in (generator.permutation(story), generator.integers(0, 2048, len(story))):
        assert float_model.loss(words.tolist()) > 5
    again = float_model.encode(", there was a girl." + ' The caterpillar said, "I will help you."' * 14)
    assert float_model.loss(again) < MAX_LOSS and distinct(again) < MIN_DISTINCT

    def damage(bundle: Path) -> None:
        for layer in range(3):
            edit_weight(f"layers.{layer}.mlp.down.weight.scale", lambda scales: scales.__imul__(4))(bundle)

    damaged = story_of(broken(built[0], tmp_path / "broken", damage))
    assert float_model.loss(damaged) > 2 * MAX_LOSS
