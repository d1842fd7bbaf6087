"""text.json of a bundle: what its tokenizer and chat template gave when it was built. Read, checked, compared.

Knows the file's keys and what must agree; knows no tokenizer but one that encodes and decodes, and no Jinja.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from kvexport.bundle.chat_format import Chat
from kvexport.bundle.manifest import REBUILD
from kvexport.errors import BundleError

if TYPE_CHECKING:
    from kvexport.bundle.bundle import Bundle

TEXT_FILE = "text.json"
FORMAT = 1
_LARGEST = 1 << 24  # bytes of the file


class Encoder(Protocol):
    def encode(self, text: str, *, special: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class TokenizerSample:
    """A text, its token ids with and without the tokenizer's special tokens around it, and those decoded."""

    text: str
    ids: tuple[int, ...]
    plain_ids: tuple[int, ...]
    decoded: str


@dataclass(frozen=True)
class TextFile:
    golden: tuple[TokenizerSample, ...]
    special_ids: tuple[int, ...]  # tokens that decoding leaves out
    chat: Chat | None
    chat_golden: tuple[tuple[tuple[dict[str, str], ...], str], ...]  # messages, and the text of them

    def to_json(self) -> dict[str, Any]:
        chat = self.chat
        return {
            "format": FORMAT,
            "golden": [
                {**vars(one), "ids": list(one.ids), "plain_ids": list(one.plain_ids)} for one in self.golden
            ],
            "special_ids": list(self.special_ids),
            "chat": None
            if chat is None
            else {**vars(chat), "begin_system": chat.begin_system and list(chat.begin_system)},
            "chat_golden": [
                {"messages": list(messages), "text": text} for messages, text in self.chat_golden
            ],
        }

    def difference(self, tokenizer: Encoder) -> str | None:
        """The first text that this tokenizer encodes or decodes otherwise, and how; None: there is none."""
        for one in self.golden:
            given = (
                tokenizer.encode(one.text),
                tokenizer.encode(one.text, special=False),
                tokenizer.decode(one.ids),
            )
            wanted = list(one.ids), list(one.plain_ids), one.decoded
            for mine, built in zip(given, wanted, strict=True):
                if mine != built:
                    return f"{one.text[:40]!r}: {str(mine)[:60]} instead of {str(built)[:60]}"
        return None


def read_text_file(bundle: Bundle) -> TextFile | None:
    """Read text.json; None if the bundle has none.

    Raises:
        BundleError: text.json is damaged, or its chat's strings do not give the text of its conversations.
    """
    if TEXT_FILE not in bundle.files:
        return None
    path = bundle.path / TEXT_FILE
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"more than {_LARGEST} bytes")
        return parse_text(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(
            f"{TEXT_FILE} of the bundle {bundle.path} cannot be read: {error}",
            fix="copy the bundle again, or " + REBUILD,
        ) from error


def parse_text(raw: object) -> TextFile:
    """text.json's values, each checked.

    Raises:
        ValueError: one is missing, of another type, or contradicts another; the message names it.
    """
    top = _keys(raw, "text.json", "format", "golden", "special_ids", "chat", "chat_golden")
    if type(top["format"]) is not int or top["format"] != FORMAT:
        raise ValueError(f"format is {top['format']!r}, and not {FORMAT}")
    golden = _list(top["golden"], "golden", _golden)
    if not golden:
        raise ValueError("golden is empty")
    special = tuple(_list(top["special_ids"], "special_ids", _id))
    chat = None if top["chat"] is None else _chat(top["chat"])
    conversations = _list(top["chat_golden"], "chat_golden", _conversation)
    for messages, text in conversations:
        if chat is None or chat.conversation(messages) != text:
            raise ValueError(f"chat does not give the text of chat_golden: {text[:60]!r}")
    return TextFile(tuple(golden), special, chat, tuple(conversations))


def _golden(raw: object, name: str) -> TokenizerSample:
    one = _keys(raw, name, "text", "ids", "plain_ids", "decoded")
    ids, plain = (tuple(_list(one[key], f"{name}.{key}", _id)) for key in ("ids", "plain_ids"))
    return TokenizerSample(
        _string(one["text"], f"{name}.text"), ids, plain, _string(one["decoded"], f"{name}.decoded")
    )


def _chat(raw: object) -> Chat:
    one = _keys(raw, "chat", "begin", "begin_system", "generate", "answer", "next", "strips")
    if type(one["strips"]) is not bool:
        raise ValueError("chat.strips is no boolean")
    around = None
    if one["begin_system"] is not None:
        strings = _list(one["begin_system"], "chat.begin_system", _string)
        if len(strings) != 2:
            raise ValueError("chat.begin_system is not two strings")
        around = (strings[0], strings[1])
    begin, generate, answer, following = (
        _string(one[key], f"chat.{key}") for key in ("begin", "generate", "answer", "next")
    )
    return Chat(begin, around, generate, answer, following, one["strips"])


def _conversation(raw: object, name: str) -> tuple[tuple[dict[str, str], ...], str]:
    one = _keys(raw, name, "messages", "text")
    messages = _list(one["messages"], f"{name}.messages", _message)
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if len(turns) % 2 == 0 or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise ValueError(f"{name} is no conversation that a user ends: {roles}")
    return tuple(messages), _string(one["text"], f"{name}.text")


def _message(raw: object, name: str) -> dict[str, str]:
    one = _keys(raw, name, "role", "content")
    return {key: _string(one[key], f"{name}.{key}") for key in ("role", "content")}


def _keys(raw: object, name: str, *keys: str) -> dict[str, Any]:
    if not isinstance(raw, dict) or any(key not in raw for key in keys):
        raise ValueError(f"{name} is no object with {', '.join(keys)}")
    return raw


def _list(raw: object, name: str, each: Callable[[object, str], Any]) -> list[Any]:
    if not isinstance(raw, list):
        raise ValueError(f"{name} is no list")
    return [each(one, f"{name}[{index}]") for index, one in enumerate(raw)]


def _string(raw: object, name: str) -> str:
    if not isinstance(raw, str) or any("\ud800" <= character <= "\udfff" for character in raw):
        raise ValueError(f"{name} is no string")
    return raw


def _id(raw: object, name: str) -> int:
    if type(raw) is not int or not 0 <= raw < 1 << 31:
        raise ValueError(f"{name} is no token id")
    return raw
