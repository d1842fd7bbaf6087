"""The window that is shown, and the text of its tokens."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.decoders import make_decoder
from support.tiny_bundles import byte_level_tokenizer
from torch import Tensor

from kvexport.analyze.sample import shown_window, token_texts
from kvexport.calibrate import recipe_for
from kvexport.errors import UsageError

Show = Callable[..., Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with a tokenizer and texts, in place of a checkpoint."""
    (tmp_path / "tokenizer.json").write_text(byte_level_tokenizer(300), encoding="utf-8")
    (tmp_path / "text.txt").write_text("A small café\n", encoding="utf-8")
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    return tmp_path


@pytest.fixture
def show(folder: Path) -> Show:
    def call(
        text: str | None = None, tokens: int = 8, source: str = "random", vocab: int = 300, **sizes: int
    ) -> Tensor:
        decoder = make_decoder(vocab=vocab, dtype=torch.float32, **sizes)
        file = None if text is None else folder / text
        windows = torch.arange(40).view(4, 10)
        return shown_window(
            decoder, folder, file, tokens, recipe_for(source, 4, 10, 5), windows, lambda: None
        )

    return call


def test_shows_the_beginning_of_a_text(show: Show, folder: Path) -> None:
    assert "".join(token_texts(folder, show("text.txt").tolist())).startswith("A small ")
    assert len(show("text.txt")) == 8
    assert show("text.txt", 200)[:8].tolist() == show("text.txt").tolist()
    assert len(show("text.txt", 200, max_positions=6)) == 6


def test_shows_names_of_tokens_that_are_parts_of_a_character(show: Show, folder: Path) -> None:
    texts = token_texts(folder, show("text.txt", 200).tolist())
    assert "\ufffd" not in "".join(texts)
    assert texts[-1] == "\n"


def test_sampled_text_is_reproducible(show: Show) -> None:
    own = show(source="self")
    assert own.tolist() == show(source="self").tolist()
    assert len(own) == 8
    assert own[0] == 1  # BOS


def test_shows_a_held_out_window_if_nothing_is_sampled(show: Show) -> None:
    assert show().tolist() == list(range(30, 38))


def test_rejects_texts_that_cannot_be_shown(show: Show) -> None:
    with pytest.raises(UsageError, match="at least 2 tokens"):
        show("empty.txt")
    with pytest.raises(UsageError, match="must be in the model's vocabulary"):
        show("text.txt", vocab=20)
    with pytest.raises(UsageError, match="must be readable"):
        show("absent.txt")


def test_shows_ids_without_a_tokenizer(tmp_path: Path, folder: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("*.json", "bare"))
    assert token_texts(bare, [3, 5]) == ["3", "5"]
