"""Streamed text: the same characters as decoding at once, none of them split, for any tokenizer."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_bundles import byte_level_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from kvexport.runtime.tokenizer import TextStream, Tokenizer


def sentence_pieces() -> Backend:
    """Words with a leading mark, special tokens and byte tokens, as in Llama 2."""
    words = ["▁Once", "▁upon", "▁a", "▁time", "▁", "a", "é", ",", "s", "ing"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    backend = Backend(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True)
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def metaspace() -> Backend:
    words = ["<s>", "▁Once", "▁upon", "▁time", "▁", "a", "日", "ing"]
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    backend.add_special_tokens(["<s>"])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def byte_ids(text: str) -> list[int]:
    """A text as the byte tokens of `sentence_pieces`."""
    return [3 + byte for byte in text.encode()]


BACKENDS = {
    "bytes": Backend.from_str(byte_level_tokenizer()),
    "sentencepiece": sentence_pieces(),
    "metaspace": metaspace(),
}


def streamed(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*map(stream.add, ids), stream.end()]


def torn(piece: str) -> bool:
    return "\ufffd" in piece


@pytest.mark.parametrize("name", ["bytes", "metaspace"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_of_any_tokens_join_to_the_whole_text(name: str, data: st.DataObject) -> None:
    """Random tokens are often invalid UTF-8: the stream may delay them, but drops and repeats nothing."""
    tokenizer = Tokenizer(BACKENDS[name])
    token = st.integers(0, BACKENDS[name].get_vocab_size() - 1)
    prompt = data.draw(st.lists(token, max_size=30))
    ids = data.draw(st.lists(token, max_size=60))
    before = tokenizer.decode(prompt)
    if torn(before[-1:]):  # a prompt that ends within a character
        return
    assert before + "".join(streamed(tokenizer, prompt, ids)) == tokenizer.decode([*prompt, *ids])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_pieces_of_words_and_byte_tokens_join_to_the_whole_text(data: st.DataObject) -> None:
    """Runs of byte tokens longer than the stream's context: decoding never starts within a character."""
    backend = BACKENDS["sentencepiece"]
    tokenizer = Tokenizer(backend)
    words = st.integers(backend.token_to_id("▁Once"), backend.get_vocab_size() - 1).map(lambda token: [token])
    characters = st.sampled_from("aéß日🙂\u0301").map(byte_ids)
    texts = st.lists(st.one_of(words, characters, characters), max_size=30).map(
        lambda parts: list(itertools.chain(*parts))
    )
    prompt, ids = data.draw(texts), data.draw(texts)
    pieces = streamed(tokenizer, [1, *prompt], ids)
    assert not any(map(torn, pieces))
    assert tokenizer.decode([1, *prompt]) + "".join(pieces) == tokenizer.decode([1, *prompt, *ids])


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("aé日🙂 \u0301\u200d🏳️🌈ß"), min_size=1, max_size=40))
def test_returns_characters_as_soon_as_they_are_complete(text: str) -> None:
    tokenizer = Tokenizer(BACKENDS["bytes"])
    ids = tokenizer.encode(text)
    pieces = streamed(tokenizer, [], ids)
    assert "".join(pieces) == text and not any(map(torn, pieces))
    assert pieces[-1] == ""  # nothing was left for the end
    for count, message in enumerate(itertools.accumulate(pieces[:-1]), 1):
        assert tokenizer.decode(ids[:count]).rstrip("\ufffd") == message


def test_keeps_spaces_between_words() -> None:
    backend = BACKENDS["sentencepiece"]
    tokenizer = Tokenizer(backend)
    once, upon, a, time = (backend.token_to_id(word) for word in ("▁Once", "▁upon", "▁a", "▁time"))
    assert streamed(tokenizer, [1, once], [upon, a, time]) == [" upon", " a", " time", ""]
    assert streamed(tokenizer, [1], [once, upon]) == ["Once", " upon", ""]  # a text has no leading space


def test_joins_byte_tokens_and_returns_an_incomplete_character_at_the_end() -> None:
    tokenizer = Tokenizer(BACKENDS["sentencepiece"])
    smile = byte_ids("🙂")
    assert streamed(tokenizer, [1], smile) == ["", "", "", "🙂", ""]
    *held, rest = streamed(tokenizer, [1], smile[:2])
    assert held == ["", ""] and torn(rest)


def test_prompt_may_end_within_a_character() -> None:
    tokenizer = Tokenizer(BACKENDS["sentencepiece"])
    smile = byte_ids("🙂")
    assert "".join(streamed(tokenizer, [1, *smile[:2]], smile[2:])) == "🙂"


def test_special_tokens_are_left_out() -> None:
    tokenizer = Tokenizer(BACKENDS["bytes"])
    assert (
        "".join(streamed(tokenizer, [], [*tokenizer.encode("Once"), 0, *tokenizer.encode(" upon")]))
        == "Once upon"
    )
