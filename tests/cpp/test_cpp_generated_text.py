"""Compares generated text and stop texts in C++ with the Python runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from drive import Drive, Refused
from genai import genai_library
from support.text_bundles import write_text_bundle
from support.tiny_bundles import edit_manifest

from kvexport.runtime import Session, open_bundle

pytestmark = pytest.mark.slow
PROMPT = "Once upon a time there was a café"


@pytest.fixture(scope="module")
def bundle(shared_folders: Any) -> Path:
    return Path(shared_folders.get(write_text_bundle))


@pytest.fixture(scope="module")
def session(bundle: Path) -> Iterator[Session]:
    with open_bundle(bundle, provider="cpu", threads=1) as session:
        yield session


@pytest.fixture(scope="module")
def drive(built: Callable[[str], Path], bundle: Path) -> Iterator[Drive]:
    # Without sanitizers, since the text library is not part of this project and has its own allocations.
    with Drive(built("release")) as drive:
        info = drive.open(bundle, text_library=str(genai_library()))
        assert info["has_text"] and info["has_chat"] and info["text_missing"] == ""
        yield drive


def generate_text(drive: Drive, ids: list[int], **options: Any) -> tuple[str, dict[str, Any]]:
    made = drive.generate(ids, **options)
    return "".join([*made["pieces"], made["rest"]]), made


def test_generated_text_is_equal(drive: Drive, session: Session) -> None:
    drive.new()
    ids = drive("encode", session="s", text=PROMPT)
    wanted = session.generate(PROMPT, max_new_tokens=60, stop=[])
    text, made = generate_text(drive, ids, max_new_tokens=60, stop_tokens=[])
    assert text == wanted.text and made["tokens"] == list(wanted.token_ids) and made["finish"] == "length"
    assert len(made["pieces"]) == 60


def test_stop_texts_end_the_output_at_the_same_place(drive: Drive, session: Session) -> None:
    """At many places of the output, within tokens and across them."""
    whole = session.generate(PROMPT, max_new_tokens=40, stop=[]).text
    assert whole is not None and len(whole) > 40
    ids = drive("encode", session="s", text=PROMPT)
    for at in range(0, len(whole) - 5, 3):
        for stops in ([whole[at : at + 5]], ["never generated", whole[at + 1 : at + 4], whole[at : at + 2]]):
            drive.new()
            wanted = session.generate(PROMPT, max_new_tokens=40, stop=stops)
            text, made = generate_text(drive, ids, max_new_tokens=40, stop_texts=stops)
            assert (text, made["tokens"], made["finish"]) == (
                wanted.text,
                list(wanted.token_ids),
                wanted.finish_reason,
            )
    with pytest.raises(Refused, match="a stop text must not be empty"):
        drive.generate(ids, stop_texts=[""])


def test_conversations_are_equal(drive: Drive, session: Session) -> None:
    """Three turns on one cache; the second ends at a stop text."""
    drive.new()
    cache = session.new_cache()
    for text, system, stop in (
        ("hello", "be brief", []),
        ("and then?", None, ["e"]),
        ("日本語 🙂", None, []),
    ):
        turn = session.turn(text, system=system, cache=cache)
        wanted = session.generate(turn, max_new_tokens=9, stop=stop, cache=cache)
        ids = drive("turn", cache="c", text=text, **({} if system is None else {"system": system}))
        text_of_turn, result = generate_text(
            drive, ids, max_new_tokens=9, **({"stop_texts": stop} if stop else {"stop_tokens": []})
        )
        assert (text_of_turn, result["tokens"], result["finish"]) == (
            wanted.text,
            list(wanted.token_ids),
            wanted.finish_reason,
        )
        assert drive("cache", cache="c")["length"] == cache.lengths[0]
    with pytest.raises(Refused, match="a system prompt must be in the first turn"):
        drive("turn", cache="c", text="again", system="be long")


def test_refuses_text_with_nul(drive: Drive) -> None:
    drive.new()
    for call in (
        lambda: drive("turn", cache="c", text="a\0b"),
        lambda: drive("turn", cache="c", text="a", system="b\0c"),
        lambda: drive.generate([1], stop_texts=["a\0b"]),
        lambda: drive("encode", session="s", text="\0"),
    ):
        with pytest.raises(Refused, match="NUL character") as refused:
            call()
        assert refused.value.parts["code"] == 2 and refused.value.parts["fix"]


def test_decode_refuses_ids_outside_the_vocabulary(drive: Drive, session: Session) -> None:
    most = session.bundle.model.vocab_size
    for wrong in (-1, most, 2**32 + 5, -(2**32) + 5, 2**62):
        with pytest.raises(Refused, match="inside the vocabulary") as refused:
            drive("decode", session="s", ids=[5, wrong])
        assert (refused.value.parts["got"], refused.value.parts["expected"]) == (
            str(wrong),
            f"0 to {most - 1}",
        )
    assert isinstance(drive("decode", session="s", ids=[0, 5, most - 1]), str)


def test_an_empty_text_starts_with_bos(drive: Drive, tmp_path: Path) -> None:
    """Without template and special tokens an empty text gives BOS, or nothing if the model has no BOS."""
    plain = write_text_bundle(tmp_path / "plain", template="")
    for bos in (1, None):
        edit_manifest(plain, lambda raw, bos=bos: raw["model"].update(bos_token_id=bos))
        assert not drive.open(plain, "plain", text_library=str(genai_library()))["has_chat"]
        drive.new("plain", "p")
        ids = drive("turn", cache="p", text="")
        with open_bundle(plain, provider="cpu", threads=1) as python:
            cache = python.new_cache()
            assert (
                ids
                == list(python._prompts.ids(python.turn("", cache=cache), cache, 0))
                == ([] if bos is None else [bos])
            )
            if ids:
                made = python.generate("", max_new_tokens=6, stop=[], cache=cache)
                assert drive.generate(ids, "p", max_new_tokens=6, stop_tokens=[])["tokens"] == list(
                    made.token_ids
                )
                made = python.generate("", max_new_tokens=6, stop=[], cache=cache)
                ids = drive("turn", cache="p", text="")
                assert ids == [] and drive.generate(ids, "p", max_new_tokens=6, stop_tokens=[])[
                    "tokens"
                ] == list(made.token_ids)
            else:
                with pytest.raises(Refused, match="a prompt must not be empty"):
                    drive.generate(ids, "p")


def test_token_ids_work_without_the_text_library(built: Callable[[str], Path], bundle: Path) -> None:
    with Drive(built("sanitized")) as drive:
        info = drive.open(bundle, text_library="/nowhere/libonnxruntime-genai.so")
        assert not info["has_text"] and "/nowhere/libonnxruntime-genai.so" in info["text_missing"]
        drive.new()
        assert len(drive.generate([1, 2, 3], max_new_tokens=5, stop_tokens=[])["tokens"]) == 5
        for call in (
            lambda: drive("encode", session="s", text="x"),
            lambda: drive("turn", cache="c", text="x"),
        ):
            with pytest.raises(Refused, match="must have a tokenizer") as refused:
                call()
            assert (
                "/nowhere/libonnxruntime-genai.so" in refused.value.parts["got"]
                and refused.value.parts["code"] == 3
            )
            assert str(refused.value).count("got:") == str(refused.value).count("fix:") == 1
            assert "onnxruntime-genai-core==0.18.0" in refused.value.parts["fix"]
