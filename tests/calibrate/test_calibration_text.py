"""Calibration recipes, text files and windows, and the error for each invalid one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from support.decoders import make_decoder

from kvexport.calibrate import calibration_windows, recipe_for
from kvexport.calibrate.recipe import Recipe
from kvexport.calibrate.text import all_windows, read_text, spread_windows, tokenize
from kvexport.errors import UsageError
from kvexport.model.decoder import Layer, LazyLayers

WORDS = ["[UNK]", *(f"w{i}" for i in range(30))]


def write_tokenizer(folder: Path, **extra: object) -> Path:
    """A checkpoint folder whose tokenizer.json maps w0 .. w29 to 1 .. 30."""
    model = {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(WORDS)}, "unk_token": "[UNK]"}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    (folder / "tokenizer.json").write_text(json.dumps(content | extra), encoding="utf-8")
    return folder


def words(count: int) -> str:
    return " ".join(f"w{i % 30}" for i in range(count))


# Recipes


def test_built_in_recipes() -> None:
    mixed, sampled, uniform = recipe_for("mixed"), recipe_for("self"), recipe_for("random")
    assert (mixed.source, sampled.source, uniform.source) == ("mixed", "self", "random")
    assert sampled.temperatures == (1.0,)
    assert mixed.temperatures == (1.0,) and uniform.temperatures == ()
    assert sampled.file is None
    assert sampled.samples >= 8
    assert sampled.length >= 128


def test_a_file_gives_a_text_recipe(tmp_path: Path) -> None:
    file = tmp_path / "corpus.txt"
    file.write_text("some text")
    recipe = recipe_for(str(file), samples=3, length=5, seed=7)
    assert recipe == Recipe("text", 3, 5, 7, file=file)
    assert recipe.to_json() == {"source": "text", "samples": 3, "length": 5, "seed": 7, "file": "corpus.txt"}


def test_options_override_the_recipe_unless_none() -> None:
    assert recipe_for("self", seed=0).seed == 0
    assert recipe_for("random", length=2).length == 2
    assert recipe_for("random", samples=None) == recipe_for("random")
    json.dumps(recipe_for("self").to_json())


@pytest.mark.parametrize(
    ("name", "value"),
    [("samples", 0), ("samples", -4), ("length", 1), ("seed", -1), ("seed", 2**63), ("samples", 2**70)],
)
def test_rejects_options_out_of_range(name: str, value: int) -> None:
    with pytest.raises(UsageError, match=f"--{name} must be an integer from") as refusal:
        recipe_for("random", **{name: value})
    assert str(value) in str(refusal.value)


@pytest.mark.parametrize("name", ["selfie", "no/such/file.txt", ""])
def test_error_for_unknown_recipe_lists_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError, match="self, random"):
        recipe_for(name)


# Reading


def test_plain_text_is_unchanged(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("one {\n\ntwo ü\u2028three".encode())
    assert read_text(file) == "one {\n\ntwo ü\u2028three"


def test_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_bytes(b"\xef\xbb\xbfone")
    lines.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    assert read_text(plain) == "one"
    assert read_text(lines) == "one\n\ntwo"


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
def test_joins_text_fields_of_json_lines(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_text('{"text": "one", "id": 3}\n\n  \n{"id": 4, "text": "two\\nlines"}\n')
    assert read_text(file) == "one\n\ntwo\nlines"


def test_unicode_line_breaks_in_json_strings_do_not_end_the_line(tmp_path: Path) -> None:
    """JSON strings may contain U+2028, U+0085 and others without escapes."""
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "a\u2028b\u0085c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_text(file) == "a\u2028b\u0085c"


@pytest.mark.parametrize(
    "line", ["not json", '{"content": "x"}', '["text"]', '"text"', "3", '{"text": null}', '{"text": 5}', "{"]
)
def test_error_for_a_bad_json_line_names_its_number(tmp_path: Path, line: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(UsageError) as refusal:
        read_text(file)
    assert f"{file}, line 3" in str(refusal.value)
    assert line in str(refusal.value)


@pytest.mark.parametrize(
    "line",
    ['{"text": "\\ud800"}', "9" * 5000, '{"text": ' + "9" * 5000 + "}", "[" * 100_000, '{"text":' * 100_000],
    ids=["unpaired surrogate", "digits", "digits in text", "nested lists", "nested objects"],
)
def test_rejects_json_lines_that_python_cannot_read(tmp_path: Path, line: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(UsageError, match="line 1, must be a JSON object with a `text` field"):
        read_text(file)


def test_rejects_text_that_is_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("über".encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin\.txt must be readable.*utf-8"):
        read_text(file)


def test_rejects_a_directory_as_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must be readable"):
        read_text(tmp_path)


# Tokens


def test_uses_the_tokenizer_of_the_checkpoint(tmp_path: Path) -> None:
    assert tokenize(write_tokenizer(tmp_path), "w0 w3 zzz") == [1, 4, 0]


def test_disables_truncation_and_padding_of_the_tokenizer(tmp_path: Path) -> None:
    folder = write_tokenizer(
        tmp_path,
        truncation={"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[UNK]",
        },
    )
    assert len(tokenize(folder, words(20))) == 20


def test_special_tokens_are_not_added(tmp_path: Path) -> None:
    special = {
        "id": 5,
        "content": "w4",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "w4", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"w4": {"id": "w4", "ids": [5], "tokens": ["w4"]}},
    }
    folder = write_tokenizer(tmp_path, added_tokens=[special], post_processor=template)
    assert tokenize(folder, "w0 w1") == [1, 2]


def test_error_without_tokenizer_suggests_other_recipes(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("text")
    with pytest.raises(UsageError, match=r"has no tokenizer\.json") as refusal:
        calibration_windows(make_decoder(), tmp_path, recipe_for(str(file)))
    assert "self or random" in str(refusal.value)


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"version": "1.0"}'])
def test_rejects_damaged_tokenizer(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UsageError, match="must be a tokenizer"):
        tokenize(tmp_path, "text")


# Windows


def test_windows_are_consecutive_and_the_rest_is_dropped() -> None:
    assert all_windows(list(range(11)), 4, "it").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("count", [0, 3])
def test_rejects_text_shorter_than_one_window(count: int) -> None:
    with pytest.raises(UsageError, match="at least as long as one window") as refusal:
        all_windows(list(range(count)), 4, "the text x")
    assert f"{count} tokens" in str(refusal.value)
    assert "--length" in str(refusal.value)


def test_windows_are_drawn_over_the_whole_text_by_seed() -> None:
    ids = list(range(400))
    drawn = spread_windows(ids, 10, 4, seed=1, what="it")
    assert drawn.shape == (10, 4)
    every = all_windows(ids, 4, "it").tolist()
    assert all(window in every for window in drawn.tolist())
    assert len({window[0] for window in drawn.tolist()}) == 10  # no window twice
    assert torch.equal(drawn, spread_windows(ids, 10, 4, seed=1, what="it"))
    assert not torch.equal(drawn, spread_windows(ids, 10, 4, seed=2, what="it"))
    assert int(drawn.max()) > 200 > int(drawn.min())
    assert len(spread_windows(ids, 1000, 4, seed=1, what="it")) == 100  # all windows


def test_calibration_windows_of_a_file(tmp_path: Path) -> None:
    decoder, file = make_decoder(), tmp_path / "a.txt"
    file.write_text(words(100))
    windows = calibration_windows(
        decoder, write_tokenizer(tmp_path), recipe_for(str(file), samples=4, length=8)
    )
    assert windows.shape == (4, 8)
    assert windows.dtype == torch.int64
    assert torch.equal(windows[:, :-1] % 30 + 1, windows[:, 1:])  # consecutive words


@pytest.mark.parametrize("content", ["", "w1 w2 w3"])
def test_error_for_a_short_file_names_it(tmp_path: Path, content: str) -> None:
    file = tmp_path / "short.txt"
    file.write_text(content)
    with pytest.raises(UsageError, match=r"short\.txt must be at least as long as one window"):
        calibration_windows(make_decoder(), write_tokenizer(tmp_path), recipe_for(str(file), length=8))


def test_rejects_tokenizer_of_another_model(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(words(100))
    with pytest.raises(UsageError, match="must be in the model's vocabulary") as refusal:
        calibration_windows(
            make_decoder(vocab=20), write_tokenizer(tmp_path), recipe_for(str(file), length=8)
        )
    assert "below 20" in str(refusal.value)


@pytest.mark.parametrize("source", ["self", "random"])
def test_rejects_windows_longer_than_the_positions_of_the_model(tmp_path: Path, source: str) -> None:
    with pytest.raises(UsageError, match="--length must not exceed") as refusal:
        calibration_windows(make_decoder(max_positions=16), tmp_path, recipe_for(source, length=17))
    assert "at most 16" in str(refusal.value)


def test_accepts_any_length_for_a_model_without_a_limit(tmp_path: Path) -> None:
    recipe = recipe_for("random", samples=1, length=1000)
    assert calibration_windows(make_decoder("bloom", max_positions=None), tmp_path, recipe).shape == (1, 1000)


def test_random_windows_are_uniform_and_read_no_layer(tmp_path: Path) -> None:
    def never(index: int) -> Layer:
        raise AssertionError(f"layer {index} was read")

    decoder = dataclasses.replace(make_decoder(vocab=10), layers=LazyLayers(2, never))
    recipe = recipe_for("random", samples=50, length=100, seed=4)
    windows = calibration_windows(decoder, tmp_path, recipe)
    counts = torch.bincount(windows.flatten(), minlength=10)
    assert len(counts) == 10
    assert int((counts - 500).abs().max()) < 100
    assert torch.equal(windows, calibration_windows(decoder, tmp_path, recipe))
    other = dataclasses.replace(recipe, seed=5)
    assert not torch.equal(windows, calibration_windows(decoder, tmp_path, other))


def test_self_windows_come_from_the_model(tmp_path: Path) -> None:
    decoder = make_decoder(dtype=torch.float32)
    calls: list[None] = []
    windows = calibration_windows(
        decoder, tmp_path, recipe_for("self", samples=3, length=6), lambda: calls.append(None)
    )
    assert windows.shape == (3, 6)
    assert (windows[:, 0] == decoder.bos_token_id).all()
    assert len(calls) == 5
