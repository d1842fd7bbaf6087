"""The shipped calibration text: documents, chat templates, windows, and tokenizers that cannot encode it."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from support.chat_templates import CHATML
from support.decoders import make_decoder, random_windows
from tokenizers import Tokenizer
from torch import Tensor

from kvexport.calibrate import calibration_windows, mixed, recipe_for, sampling, sampling_steps, usable_recipe
from kvexport.calibrate.mixed import KINDS, documents_of, messages_of, mixed_tokens, reason_against
from kvexport.calibrate.text import spread_windows
from kvexport.files.resources import resource
from kvexport.model.decoder import Decoder
from kvexport.model.placement import place

DEMO_VOCABULARY = 2048


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder with the demo model's tokenizer, a byte-level BPE."""
    shutil.copy(resource("models", "demo", "tokenizer.json"), tmp_path / "tokenizer.json")
    return tmp_path


@pytest.fixture
def decoder() -> Decoder:
    return make_decoder(vocab=DEMO_VOCABULARY, max_positions=512)


def text_of(folder: Path, seed: int = 0) -> str:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    decoded: str = tokenizer.decode(mixed_tokens(folder, seed), skip_special_tokens=False)
    return decoded


def test_documents_of_all_kinds_are_whole_and_small() -> None:
    for kind in KINDS:
        documents = documents_of(kind)
        assert len(documents) > 10
        assert all(document == document.strip("\n") and len(document) > 40 for document in documents)
        assert not any("-----\n" in document for document in documents)
    files = [resource("calibration", f"{kind}.txt") for kind in KINDS]
    assert sum(file.stat().st_size for file in files) < 450_000
    assert sorted(file.name for file in files) == sorted(
        path.name for path in resource("calibration").glob("*.txt")
    )


def test_conversations_have_messages_and_other_documents_have_none() -> None:
    document = "System: Be brief.\n\nUser: One?\n\nTwo?\n\nAssistant: 1\n\n2"
    assert messages_of(document) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?\n\nTwo?"},
        {"role": "assistant", "content": "1\n\n2"},
    ]
    assert messages_of("A word first.\n\nUser: no conversation") == []
    found = [messages_of(document) for document in documents_of("dialogue")]
    assert sum(bool(each) for each in found) > 20
    for messages in filter(None, found):
        roles = [each["role"] for each in messages if each["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
    assert not any(messages_of(document) for document in documents_of("articles"))


def test_without_a_chat_template_all_documents_are_encoded_as_they_are(folder: Path) -> None:
    text = text_of(folder)
    for kind in KINDS:
        for document in documents_of(kind):
            assert document in text
    assert sorted(mixed_tokens(folder, 0)) != mixed_tokens(folder, 0)
    assert text_of(folder, seed=1) != text


def test_conversations_are_rendered_by_the_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(CHATML)
    text = text_of(folder)
    (hospital,) = (each for each in documents_of("dialogue") if "radiology department" in each)
    rendered = "".join(
        f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in messages_of(hospital)
    )
    assert rendered in text
    assert hospital not in text
    assert documents_of("articles")[0] in text


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% if %}"], ids=["refuses", "damaged"])
def test_a_template_that_fails_leaves_conversations_as_they_are(folder: Path, template: str) -> None:
    plain = mixed_tokens(folder, 0)
    (folder / "chat_template.jinja").write_text(template)
    assert mixed_tokens(folder, 0) == plain


def test_shipped_windows_depend_on_the_seed_and_some_begin_with_bos(folder: Path, decoder: Decoder) -> None:
    decoder = dataclasses.replace(decoder, bos_token_id=0)  # <|endoftext|>, which is not in the text
    recipe = dataclasses.replace(recipe_for("mixed"), sampled=0.0)
    windows = calibration_windows(decoder, folder, recipe)
    assert windows.shape == (recipe.samples, recipe.length)
    assert torch.equal(windows, calibration_windows(decoder, folder, recipe))
    other = calibration_windows(decoder, folder, dataclasses.replace(recipe, seed=1))
    assert not torch.equal(windows, other)
    begins = windows[:, 0] == decoder.bos_token_id
    assert int(begins.sum()) == recipe.samples // 4
    without = calibration_windows(dataclasses.replace(decoder, bos_token_id=None), folder, recipe)
    assert torch.equal(without[:, 1:], windows[:, 1:])
    assert not (without[:, 0] == decoder.bos_token_id).any()


def test_a_share_of_the_windows_is_sampled_from_the_model(folder: Path, decoder: Decoder) -> None:
    decoder, calls = dataclasses.replace(decoder, bos_token_id=0), list[None]()
    recipe = recipe_for("mixed", samples=16, length=12)
    windows = calibration_windows(decoder, folder, recipe, lambda: calls.append(None))
    assert recipe.sampled_windows == 4
    assert len(calls) == sampling_steps(decoder, 4, 12)
    begins = windows[:, 0] == decoder.bos_token_id
    own = calibration_windows(decoder, folder, recipe_for("self", samples=4, length=12))
    assert sorted(windows[begins].tolist()) == sorted(own.tolist())
    shipped = dataclasses.replace(recipe, samples=12, sampled=0.0)
    plain = calibration_windows(dataclasses.replace(decoder, bos_token_id=None), folder, shipped)
    assert sorted(windows[~begins].tolist()) == sorted(plain.tolist())
    assert "sampled" in recipe.to_json() and "sampled" not in shipped.to_json()


def test_a_model_that_does_not_fit_into_memory_is_not_sampled(
    folder: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixed, "_CHANCE", math.inf)  # the weights are random
    requested = recipe_for("mixed", samples=8, length=12)
    assert usable_recipe(requested, decoder, folder) == requested
    monkeypatch.setattr(sampling, "_free_memory", lambda device: 0)
    recipe = usable_recipe(requested, decoder, folder)
    assert (recipe.source, recipe.sampled_windows) == ("mixed", 0)
    assert "does not fit into memory" in str(recipe.to_json()["reason"])
    assert len(calibration_windows(decoder, folder, recipe)) == 8


# Models and tokenizers that are made for other text


def test_a_model_that_is_no_worse_than_chance_by_far_keeps_the_recipe(folder: Path, decoder: Decoder) -> None:
    assert "cannot predict" in str(reason_against(folder, decoder))  # its weights are random
    checked = spread_windows(mixed_tokens(folder, 0), mixed._CHECKED, mixed._CHECKED_LENGTH, 0, "the text")
    frequent = _unigram(decoder, checked.flatten())
    assert reason_against(folder, frequent) is None
    assert usable_recipe(recipe_for("mixed"), frequent, folder) == recipe_for("mixed")


@pytest.mark.parametrize("vocabulary", [{}, {"the": 0}])
def test_a_tokenizer_that_drops_most_of_the_text_is_a_reason_against_it(
    folder: Path, decoder: Decoder, vocabulary: dict[str, int]
) -> None:
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert reason_against(folder, decoder) == "the tokenizer encodes the shipped calibration text as 0 tokens"
    assert usable_recipe(recipe_for("mixed"), decoder, folder).source == "self"


def test_logits_that_are_not_finite_are_a_reason_against_the_shipped_text(
    folder: Path, decoder: Decoder
) -> None:
    assert decoder.head is not None
    infinite = dataclasses.replace(
        decoder, head=dataclasses.replace(decoder.head, weight=decoder.head.weight * 1e308)
    )
    assert "cannot predict the shipped text (cross-entropy nan" in str(reason_against(folder, infinite))


def _unigram(decoder: Decoder, ids: Tensor) -> Decoder:
    """A decoder that predicts every token by its frequency in `ids`: its final norm gives one vector."""
    counts = torch.bincount(ids, minlength=decoder.dims.vocab_size)
    logits = (counts + 0.01).log().to(decoder.embedding.weight.dtype)
    width = decoder.dims.hidden_size
    assert decoder.head is not None
    one = torch.eye(width, dtype=logits.dtype)[0]
    norm = dataclasses.replace(decoder.final_norm, kind="layer", weight=torch.zeros_like(one), bias=one)
    weight = torch.nn.functional.pad(logits[:, None], (0, width - 1))
    return dataclasses.replace(
        decoder, final_norm=norm, head=dataclasses.replace(decoder.head, weight=weight)
    )


def write_words(folder: Path, words: dict[str, int], unknown: str | None) -> None:
    model: dict[str, object] = {"type": "WordLevel", "vocab": words, "unk_token": unknown or "[UNK]"}
    content = {"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("none", "no usable tokenizer"),
        ("few words", "as one token"),
        ("no unknown token", "no usable tokenizer"),
        ("small vocabulary", "above the model's vocabulary of 1000"),
    ],
)
def test_otherwise_the_model_is_sampled_and_the_record_says_why(folder: Path, case: str, reason: str) -> None:
    vocabulary = 1000 if case == "small vocabulary" else DEMO_VOCABULARY
    if case == "none":
        (folder / "tokenizer.json").unlink()
    elif case == "few words":
        write_words(folder, {"[UNK]": 0, "the": 1, "and": 2}, "[UNK]")
    elif case == "no unknown token":
        write_words(folder, {"the": 1, "and": 2}, None)
    decoder = make_decoder(vocab=vocabulary)
    requested = recipe_for("mixed", samples=3, length=9, seed=5)
    recipe = usable_recipe(requested, decoder, folder)
    assert (recipe.source, recipe.temperatures) == ("self", (1.0,))
    assert (recipe.samples, recipe.length, recipe.seed) == (3, 9, 5)
    assert reason in str(recipe.to_json()["reason"])
    assert calibration_windows(decoder, folder, recipe).shape == (3, 9)
    for source in ("self", "random"):  # what the user names is never replaced
        assert usable_recipe(recipe_for(source), decoder, folder) == recipe_for(source)
        assert "reason" not in recipe_for(source).to_json()


def test_the_check_of_the_text_runs_on_the_device_of_the_model(device: torch.device) -> None:
    decoder = make_decoder(dtype=torch.float32)
    windows = random_windows(decoder, 3, 12)
    here, there = (mixed._cross_entropy(each, windows) for each in (decoder, place(decoder, device)))
    assert there == pytest.approx(here, rel=1e-5)
    with pytest.raises(RuntimeError, match="on the same device"):
        mixed._cross_entropy(dataclasses.replace(place(decoder, device), layers=decoder.layers), windows)
