"""Turns of the reduced chat template; text.json is read, validated, and compared with the tokenizer."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import chat_templates
from support.tiny_bundles import byte_level_tokenizer

from kvexport.build.text_files import TEXTS, write_text_files
from kvexport.bundle import Bundle
from kvexport.bundle.chat_format import Chat
from kvexport.bundle.manifest import FileEntry
from kvexport.bundle.text_file import parse_text, read_text_file
from kvexport.errors import BundleError, CannotRunHere, UsageError
from kvexport.files.hashing import sha256_of
from kvexport.files.schema import Table
from kvexport.progress import Progress
from kvexport.runtime.tokenizer import tokenizer_of

CHAT = Chat("<b><u>", ("<b><s>", "</s><u>"), "</u><a>", " ", "</a><u>", strips=True)


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def written(folder: Path, tokenizer: str, config: dict[str, Any] | None = None) -> list[str]:
    """Write the text files of a checkpoint into its folder; returns the notes of the build."""
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    notes = Notes()
    write_text_files(folder, folder, capacity=64, vocab_size=320, bos=None, eos=(0, 3), progress=notes)
    return notes.notes


@pytest.fixture
def bundle(tmp_path: Path, tiny_bundle: Path) -> Callable[[], Bundle]:
    """A bundle with the files in `tmp_path`."""

    def opened() -> Bundle:
        files = {each.name: FileEntry(sha256_of(each), each.stat().st_size) for each in tmp_path.iterdir()}
        return Bundle(**{**vars(Bundle.open(tiny_bundle)), "files": files, "path": tmp_path})

    return opened


def test_turns() -> None:
    assert CHAT.turn(" hello\n", None, True) == "<b><u>hello</u><a>"
    assert CHAT.turn("hello", "be kind ", True) == "<b><s>be kind</s><u>hello</u><a>"
    assert CHAT.turn("more", None, False) == "</a><u>more</u><a>"


def test_rejects_impossible_system_prompts() -> None:
    with pytest.raises(UsageError, match="in the first turn"):
        CHAT.turn("more", "be kind", False)
    with pytest.raises(UsageError, match="must support a system prompt"):
        Chat("<b>", None, "", "", "", strips=False).turn("hello", "be kind", True)


def test_conversation_includes_the_start_of_an_answer() -> None:
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert CHAT.conversation(talk) == "<b><u>a</u><a> b</a><u>c</u><a>"


def test_reads_what_a_build_wrote(tmp_path: Path, bundle: Callable[[], Bundle]) -> None:
    config = {
        "tokenizer_class": "BloomTokenizerFast",
        "eos_token": "<|end|>",
        "chat_template": chat_templates.CHATML,
    }
    assert written(tmp_path, byte_level_tokenizer(), config) == []
    actual = read_text_file(bundle())
    assert actual is not None and actual.chat is not None
    assert [one.text for one in actual.samples[: len(TEXTS)]] == list(TEXTS)
    assert {text for _, text in actual.chat_samples} == {one.text for one in actual.samples[len(TEXTS) :]}
    assert actual.special_ids == (0,)
    tokenizer = tokenizer_of(bundle(), read_text_file(bundle()))
    assert tokenizer is not None and actual.difference(tokenizer) is None
    assert json.loads((tmp_path / "genai_config.json").read_text())["model"]["eos_token_id"] == 0
    known = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert known["tokenizer_class"] == "PreTrainedTokenizerFast" and known["eos_token"] == "<|end|>"
    assert "chat_template" not in known


def test_reports_what_a_template_lacks(tmp_path: Path, bundle: Callable[[], Bundle]) -> None:
    (note,) = written(tmp_path, byte_level_tokenizer(), {"chat_template": "{{ 1 }}"})
    assert "cannot be reduced" in note and read_text_file(bundle()).chat is None


def test_writes_no_text_files_without_a_tokenizer(tmp_path: Path, bundle: Callable[[], Bundle]) -> None:
    write_text_files(tmp_path, tmp_path, capacity=64, vocab_size=320, bos=None, eos=(), progress=Progress())
    assert list(tmp_path.iterdir()) == [] and read_text_file(bundle()) is None


def test_sets_the_tokenizer_class_that_genai_needs(tmp_path: Path) -> None:
    raw = json.loads(byte_level_tokenizer())
    raw["model"]["byte_fallback"] = True
    written(tmp_path, json.dumps(raw))
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "GemmaTokenizer"


def test_rejects_a_tokenizer_that_gives_other_ids(tmp_path: Path, bundle: Callable[[], Bundle]) -> None:
    written(tmp_path, byte_level_tokenizer())
    assert tokenizer_of(bundle(), read_text_file(bundle())) is not None
    other = json.loads(byte_level_tokenizer())
    other["model"]["merges"] = other["model"]["merges"][1:]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(CannotRunHere, match="must give the token ids of the build") as caught:
        tokenizer_of(bundle(), read_text_file(bundle()))
    assert "tokenizers " in str(caught.value) and "Once upon" in str(caught.value)


def test_rejects_a_tokenizer_that_decodes_differently(tmp_path: Path, bundle: Callable[[], Bundle]) -> None:
    written(tmp_path, byte_level_tokenizer())
    raw = json.loads(byte_level_tokenizer())
    raw["decoder"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(CannotRunHere, match="must give the token ids of the build"):
        tokenizer_of(bundle(), read_text_file(bundle()))


def sound() -> dict[str, Any]:
    talk = [{"role": "user", "content": "a"}]
    return {
        "format": 1,
        "golden": [{"text": "a", "ids": [1, 2], "plain_ids": [2], "decoded": "a"}],
        "special_ids": [1],
        "chat": {
            "begin": "<",
            "begin_system": ["(", ")"],
            "generate": ">",
            "answer": "",
            "next": ";",
            "strips": False,
        },
        "chat_golden": [{"messages": talk, "text": "<a>"}],
    }


def change(*path: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    def edit(raw: Any) -> None:
        for key in path[:-1]:
            raw = raw[key]
        if to is KeyError:
            del raw[path[-1]]
        else:
            raw[path[-1]] = to

    return edit


def test_text_file_round_trip() -> None:
    assert parse_text(Table(sound(), "text.json")).to_json() == sound()


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (change("format", to=2), "format"),
        (change("format", to=True), "format"),
        (change("golden", to=[]), "golden"),
        (change("golden", to=KeyError), "golden"),
        (change("golden", 0, "ids", to=[1.0]), "golden[0].ids[0]"),
        (change("golden", 0, "ids", to=[-1]), "golden[0].ids[0]"),
        (change("golden", 0, "plain_ids", to=[1 << 31]), "golden[0].plain_ids[0]"),
        (change("golden", 0, "text", to=None), "golden[0].text"),
        (change("golden", 0, "text", to="\ud800"), "golden[0].text"),
        (change("golden", 0, "decoded", to=KeyError), "decoded"),
        (change("special_ids", to={}), "special_ids"),
        (change("special_ids", to=[True]), "special_ids[0]"),
        (change("chat", to=[]), "chat"),
        (change("chat", "strips", to=1), "chat.strips"),
        (change("chat", "begin_system", to=["a"]), "chat.begin_system"),
        (change("chat", "begin_system", to=["a", 1]), "chat.begin_system[1]"),
        (change("chat", "generate", to=[]), "chat.generate"),
        (change("chat", "answer", to=KeyError), "answer"),
        (change("chat", "begin", to="["), "chat_golden"),
        (change("chat", to=None), "chat_golden"),
        (change("chat_golden", 0, "messages", to=[]), "chat_golden[0]"),
        (change("chat_golden", 0, "messages", 0, "role", to="assistant"), "chat_golden[0]"),
        (change("chat_golden", 0, "messages", 0, "role", to="system"), "chat_golden[0]"),
        (change("chat_golden", 0, "messages", 0, "content", to=1), "chat_golden[0].messages[0].content"),
    ],
)
def test_rejects_damaged_text_files(
    tmp_path: Path, bundle: Callable[[], Bundle], edit: Callable[[dict[str, Any]], None], named: str
) -> None:
    raw = sound()
    edit(raw)
    (tmp_path / "text.json").write_text(json.dumps(raw))
    with pytest.raises(BundleError, match=r"text\.json") as caught:
        read_text_file(bundle())
    assert named in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 100_000, b"1" * 5000, b"null"])
def test_rejects_a_text_file_that_is_not_json(
    tmp_path: Path, bundle: Callable[[], Bundle], content: bytes
) -> None:
    (tmp_path / "text.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"text\.json"):
        read_text_file(bundle())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def places(raw: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    inner = raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ()
    return [path] * bool(path) + [storage for key, each in inner for storage in places(each, (*path, key))]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(places(sound())), JSON)
def test_any_change_is_read_or_rejected(storage: tuple[str | int, ...], value: object) -> None:
    raw = copy.deepcopy(sound())
    change(*storage, to=value)(raw)
    try:
        parse_text(Table(raw, "text.json"))
    except UsageError:
        return
