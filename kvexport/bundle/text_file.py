"""text.json of a bundle.

Samples of its tokenizer's output, and its chat template, as recorded when it was built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvexport.bundle.bundle import Bundle
from kvexport.bundle.chat_format import Chat
from kvexport.bundle.manifest import REBUILD
from kvexport.errors import BundleError, reason_of
from kvexport.files.schema import Table, read_limited

TEXT_FILE = "text.json"
FORMAT = 1
_MAX_BYTES = 1 << 24
_FIX = "copy the bundle again, or " + REBUILD
_MAX_ID = (1 << 31) - 1


class Encoder(Protocol):
    """A tokenizer."""

    def encode(self, text: str, *, special: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class TokenizerSample:
    """A text and what the tokenizer makes of it.

    Attributes:
        text: the text.
        ids: its token ids, with the tokenizer's special tokens.
        plain_ids: without them.
        decoded: the text of `ids`.
    """

    text: str
    ids: tuple[int, ...]
    plain_ids: tuple[int, ...]
    decoded: str


@dataclass(frozen=True)
class TextFile:
    """The content of text.json, where `samples` is called "golden" and `chat_samples` "chat_golden".

    Attributes:
        samples: at least one.
        special_ids: tokens that decoding leaves out.
        chat: the chat template; None if there is none that can be reduced.
        chat_samples: conversations (messages with role and content), and the text of each.
    """

    samples: tuple[TokenizerSample, ...]
    special_ids: tuple[int, ...]
    chat: Chat | None
    chat_samples: tuple[tuple[tuple[dict[str, str], ...], str], ...]

    def to_json(self) -> dict[str, Any]:
        """Values for `json.dumps`; `parse_text` reads them back."""
        chat = None
        if self.chat is not None:
            around = self.chat.begin_system
            chat = {**vars(self.chat), "begin_system": None if around is None else list(around)}
        return {
            "format": FORMAT,
            "golden": [
                {**vars(one), "ids": list(one.ids), "plain_ids": list(one.plain_ids)} for one in self.samples
            ],
            "special_ids": list(self.special_ids),
            "chat": chat,
            "chat_golden": [
                {"messages": list(messages), "text": text} for messages, text in self.chat_samples
            ],
        }

    def difference(self, tokenizer: Encoder) -> str | None:
        """The first sample that a tokenizer encodes or decodes differently, as a message.

        None if all agree.
        """
        for one in self.samples:
            actual = (
                tokenizer.encode(one.text),
                tokenizer.encode(one.text, special=False),
                tokenizer.decode(one.ids),
            )
            expected = list(one.ids), list(one.plain_ids), one.decoded
            for got, correct in zip(actual, expected, strict=True):
                if got != correct:
                    return f"{one.text[:40]!r}: {str(got)[:60]} instead of {str(correct)[:60]}"
        return None


def read_text_file(bundle: Bundle) -> TextFile | None:
    """Read and validate text.json; None if the bundle has none.

    Raises:
        BundleError: text.json is damaged, or its chat template does not give the text of its conversations.
    """
    if TEXT_FILE not in bundle.files:
        return None
    path = f"{TEXT_FILE} of the bundle {bundle.path}"
    try:
        content = read_limited(bundle.path / TEXT_FILE, _MAX_BYTES)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} must be readable: {reason_of(error)}", fix=_FIX) from error
    return parse_text(Table.from_json(content, path, error=BundleError, fix=_FIX))


def parse_text(table: Table) -> TextFile:
    """The typed content of text.json.

    Raises:
        KvexportError: the table's error class: a key is missing, has another type, or contradicts another.
    """
    table.integer("format", FORMAT, FORMAT)
    samples = tuple(_sample(each) for each in table.tables("golden"))
    if not samples:
        table.fail("golden", "at least one sample")
    special = table.integers("special_ids", 0, _MAX_ID)
    chat = None if table.is_null("chat") else _chat(table.table("chat"))
    conversations = tuple(_conversation(each) for each in table.tables("chat_golden"))
    for messages, text in conversations:
        if chat is None or chat.conversation(messages) != text:
            table.fail(
                "chat_golden", f"the text that chat gives for every conversation, unlike {text[:60]!r}"
            )
    return TextFile(samples, special, chat, conversations)


def _sample(table: Table) -> TokenizerSample:
    ids, plain = table.integers("ids", 0, _MAX_ID), table.integers("plain_ids", 0, _MAX_ID)
    return TokenizerSample(table.text("text"), ids, plain, table.text("decoded"))


def _chat(table: Table) -> Chat:
    around = None
    if not table.is_null("begin_system"):
        before, *after = table.texts("begin_system") or ("",)
        if len(after) != 1:
            table.fail("begin_system", "null or two strings")
        around = (before, after[0])
    return Chat(
        begin=table.text("begin"),
        begin_system=around,
        generate=table.text("generate"),
        answer=table.text("answer"),
        next=table.text("next"),
        strips=table.boolean("strips"),
    )


def _conversation(table: Table) -> tuple[tuple[dict[str, str], ...], str]:
    messages = [
        {key: message.text(key) for key in ("role", "content")} for message in table.tables("messages")
    ]
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if len(turns) % 2 == 0 or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        table.fail(
            "messages", "an optional system message, then user and assistant in turn, the last by user"
        )
    return tuple(messages), table.text("text")
