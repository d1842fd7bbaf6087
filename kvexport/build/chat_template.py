"""A checkpoint's chat template (Jinja), reduced to the few strings that stand between what people and the model say.

Knows where checkpoints keep a template and what a reduced one must reproduce; a template is rendered in `chat_rendering`,
and a reduced one in `kvexport.bundle.chat_format`. What cannot be reduced is said in a note, and never stops a build.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvexport.build.jinja_sandbox import DATE, Rendered, TemplateFailed, render
from kvexport.bundle.chat_format import Chat

_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_MARKS = {
    "S": "kvxsystemq",
    "U1": "kvxfirstq",
    "A1": "kvxsecondq",
    "U2": "kvxthirdq",
    "A2": "kvxfourthq",
    "U3": "kvxfifthq",
}
_Messages = list[dict[str, str]]
TokenizerSample = tuple[tuple[dict[str, str], ...], str]


@dataclass(frozen=True)
class Reduced:
    chat: Chat | None
    golden: tuple[TokenizerSample, ...]  # conversations, and the template's text of each
    notes: tuple[str, ...]  # what the user should know


def reduced_chat(checkpoint: Path) -> Reduced:
    """The checkpoint's chat template in its reduced form, if it has one that can be reduced."""
    try:
        config = _json(checkpoint / "tokenizer_config.json")
        template = _template(checkpoint, config)
        if template is None:
            return Reduced(None, (), ())
        return _reduced(template, special_tokens(checkpoint))
    except (TemplateFailed, ImportError, OSError, ValueError, RecursionError) as error:
        return Reduced(
            None, (), (f"the chat template cannot be reduced: {error}; text still works, without it",)
        )


def _template(checkpoint: Path, config: Mapping[str, Any]) -> str | None:
    file = checkpoint / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    said = config.get("chat_template")
    if isinstance(said, list):  # several by name
        named = {one.get("name"): one.get("template") for one in said if isinstance(one, dict)}
        said = named.get("default")
    if said is not None and not isinstance(said, str):
        raise ValueError("chat_template in tokenizer_config.json is no text")
    return said


def _json(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return found


def special_tokens(checkpoint: Path) -> dict[str, str]:
    """Special tokens by name (`bos_token`, ...), from tokenizer_config.json, or else special_tokens_map.json.

    Raises:
        ValueError: one of them is damaged.
    """
    said = {**_json(checkpoint / "special_tokens_map.json"), **_json(checkpoint / "tokenizer_config.json")}
    named = {name: _token_text(said.get(name)) for name in _TOKENS}
    return {name: text for name, text in named.items() if text is not None}


def _token_text(token: object) -> str | None:
    """A special token as Hugging Face's JSON has it: a text, or an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _reduced(template: str, tokens: Mapping[str, str]) -> Reduced:
    """Render a marked conversation, cut it at the marks, and hold the pieces against the template on other ones."""
    marked = _talk(**_MARKS)
    golden = [_talk(**words) for words in _WORDS]
    asked = [marked, marked[1:], *golden, *(one[1:] for one in golden)]
    rendered, dated = render(template, tokens, asked)
    (with_system, plain), rest = rendered[:2], rendered[2:]
    chat = _cut(plain)
    around = _around_system(chat, with_system)
    spaced = rest[-1]  # of the last conversation, whose contents have white space around
    chat = replace(chat, strips=spaced.text == replace(chat, strips=True).conversation(asked[-1]))
    pairs = list(zip(asked[2:], rest, strict=True))
    count = len(_WORDS)
    held, notes = _require_same(chat, pairs[count:]), []
    try:
        if around is None:
            raise ValueError(with_system.error or "it is not put before the conversation")
        chat = replace(chat, begin_system=around)
        held += _require_same(chat, pairs[: count - 1])
    except ValueError as error:
        chat = replace(chat, begin_system=None)
        notes.append(
            f"the chat template's system prompt cannot be reduced: {error}; conversations begin without one"
        )
    if dated:
        notes.append(f"the chat template writes the day's date: the bundle writes {DATE:%d %B %Y}, always")
    return Reduced(chat, tuple(held), tuple(notes))


def _cut(rendered: Rendered) -> Chat:
    """The pieces between the marks of a conversation without a system prompt."""
    if rendered.text is None:
        raise ValueError(rendered.error)
    pieces, rest = [], rendered.text
    for mark in (_MARKS[name] for name in ("U1", "A1", "U2", "A2", "U3")):
        before, found, rest = rest.partition(mark)
        if not found or mark in rest:
            raise ValueError("it does not write every message once, in order")
        pieces.append(before)
    begin, answered, following, *again = pieces
    if again != [answered, following] or not answered.startswith(rest):
        raise ValueError("it writes later messages in another way than earlier ones, or than those to come")
    return Chat(begin, None, rest, answered[len(rest) :], following, strips=False)


def _around_system(chat: Chat, rendered: Rendered) -> tuple[str, str] | None:
    if rendered.text is None:
        return None
    before, found, rest = rendered.text.partition(_MARKS["S"])
    after, first, _ = rest.partition(_MARKS["U1"])
    return (before, after) if found and first else None


def _require_same(chat: Chat, pairs: Sequence[tuple[_Messages, Rendered]]) -> list[TokenizerSample]:
    """The conversations with their text, which the reduced form gives as the template does.

    Raises:
        ValueError: it does not.
    """
    for messages, rendered in pairs:
        if rendered.text is None:
            raise ValueError(rendered.error)
        mine = chat.conversation(messages)
        if mine != rendered.text:
            at = next(
                (i for i, (a, b) in enumerate(zip(mine, rendered.text, strict=False)) if a != b),
                min(len(mine), len(rendered.text)),
            )
            raise ValueError(
                f"it writes {rendered.text[at : at + 40]!r} where a reduced one writes {mine[at : at + 40]!r}"
            )
    return [(tuple(messages), rendered.text or "") for messages, rendered in pairs]


def _talk(S: str, U1: str, **turns: str) -> _Messages:
    """A system's message, a user's, and then the assistant's and the user's by turns."""
    talk = [{"role": "system", "content": S}, {"role": "user", "content": U1}]
    for name, content in turns.items():
        talk.append({"role": "assistant" if name.startswith("A") else "user", "content": content})
    return talk


# Conversations that a reduced template must write as the template does; the last has white space around its contents.
_WORDS = (
    {"S": "You are the robot's voice. Answer in one sentence.", "U1": "What is in front of you?"},
    {
        "S": "Réponds en français.\n\nSois bref.",
        "U1": "Combien font 12 × 3 ?",
        "A1": "36.",
        "U2": 'And in {{ words }}, "please"?\n\n- one\n- two',
    },
    {
        "S": "S",
        "U1": "日本語で。",
        "A1": "はい。",
        "U2": "🙂 <b>ok</b>",
        "A2": "Good.\nBye.",
        "U3": "The end",
    },
    {"S": "S", "U1": "  spaces before and after \n", "A1": "Yes.", "U2": "\n\nnew lines\n"},
)
