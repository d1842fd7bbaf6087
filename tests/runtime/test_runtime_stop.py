"""Stop texts: found wherever tokens split them, and never part of the returned text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvexport.errors import UsageError
from kvexport.runtime import Session, open_bundle
from kvexport.runtime.tokenizer import StopTexts, read_tokenizer

letters = st.text("abc", max_size=30)
stops = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


def message(texts: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    until = StopTexts(texts)
    return [*map(until.add, pieces), until.end()], until.matched


@given(letters, stops, st.lists(st.integers(1, 4)))
@example("aab", ["ab"], [1, 1, 1])
@example("abcab", ["abcac", "ca"], [1] * 5)
def test_returns_nothing_of_a_stop_text_however_pieces_are_cut(
    text: str, texts: list[str], cuts: list[int]
) -> None:
    pieces, rest = [], text
    for cut in cuts:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    pieces.append(rest)
    report, actual = message(texts, pieces)
    whole = "".join(report)
    assert actual == any(each in text for each in texts)
    assert text.startswith(whole) and not any(each in whole for each in texts)
    if not actual:
        assert whole == text
    else:
        assert any(text.startswith(each, len(whole)) for each in texts)
    for count in range(len(report)):  # as early as can be: what waits may begin a stop
        waiting = "".join(pieces[:count])[len("".join(report[:count])) :]
        assert actual or not waiting or any(each.startswith(waiting) for each in texts)


def test_detects_an_implementation_that_holds_nothing_back() -> None:
    assert message(["ab"], ["a", "b"]) == (["", "", ""], True)
    assert message([], ["a", "b"]) == (["a", "b", ""], False)
    assert message(["aac"], ["a", "a", "a", "b", "aa"]) == (["", "", "a", "aab", "", "aa"], False)


@pytest.fixture
def text_session(text_bundle: Path) -> Session:
    return open_bundle(text_bundle, threads=1)


OPTIONS = {"max_new_tokens": 40, "temperature": 1.0}


def test_generated_text_ends_before_the_stop(text_session: Session) -> None:
    observed = 0
    for seed in range(16):
        free = text_session.generate("Once upon", seed=seed, **OPTIONS)
        assert free.text is not None
        for length in (1, 3):
            stop = free.text[len(free.text) // 2 :][:length]
            if "\ufffd" in stop or not stop:
                continue
            made = text_session.generate("Once upon", seed=seed, stop=[stop], **OPTIONS)
            stream = text_session.stream("Once upon", seed=seed, stop=[stop, "never there"], **OPTIONS)
            pieces = list(stream)
            assert (
                made.text == free.text[: free.text.index(stop)] == "".join(pieces)
                and made.finish_reason == "stop"
            )
            assert stream.generation == made and all(pieces)
            # The tokens are those up to the one that completed the stop text; no further one was run.
            assert free.token_ids[: len(made.token_ids)] == made.token_ids
            assert stop in read_tokenizer(text_session.bundle.path).decode(made.token_ids)
            assert stop not in read_tokenizer(text_session.bundle.path).decode(made.token_ids[:-1])
            assert text_session.lengths.tolist() == [made.prompt_tokens + len(made.token_ids) - 1]
            observed += 1
    assert observed > 8


def test_rows_of_a_batch_stop_independently(text_session: Session) -> None:
    prompts = ["Once upon", "naïve 日本", "a"]
    free = text_session.generate(prompts, max_new_tokens=30, temperature=0.9, seed=1)
    stop = next(
        free[0].text[at : at + 2]
        for at in range(4, 30)
        if free[0].text and "\ufffd" not in free[0].text[at : at + 2]
    )
    made = text_session.generate(prompts, stop=[stop], max_new_tokens=30, temperature=0.9, seed=1)
    assert made[0].finish_reason == "stop" and made[0].text is not None and stop not in made[0].text
    for one, other in zip(made, free, strict=True):
        assert other.text is not None and one.text is not None and other.text.startswith(one.text)
        assert (one == other) == (stop not in other.text)


def test_stop_tokens_replace_the_models_own_and_texts_do_not(text_session: Session) -> None:
    own = text_session.bundle.model.eos_token_ids
    assert own == (0,)
    from kvexport.runtime.generation import Stop

    for stop, tokens, texts in (
        (None, {0}, ()),
        ([], set(), ()),
        ([5, 7], {5, 7}, ()),
        (["x"], {0}, ("x",)),
        ("xy", {0}, ("xy",)),
        ([5, "x"], {5}, ("x",)),
    ):
        assert Stop.of(stop, own, 10) == Stop(frozenset(tokens), texts)


def test_returns_held_back_text_at_the_end(text_session: Session) -> None:
    free = text_session.generate("Once upon", max_new_tokens=12)
    assert free.text is not None
    never = free.text[-1] + "\x00"
    assert text_session.generate("Once upon", stop=[never], max_new_tokens=12) == free
    assert "".join(text_session.stream("Once upon", stop=[never], max_new_tokens=12)) == free.text


def test_rejects_invalid_stops(text_session: Session, opened: Callable[..., Session]) -> None:
    with pytest.raises(UsageError, match="must not be empty"):
        text_session.generate("a", stop=["x", ""])
    with pytest.raises(UsageError, match="must have a tokenizer"):
        opened().generate([1], stop=["x"])
