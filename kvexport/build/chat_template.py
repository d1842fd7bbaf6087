"""Reduce a checkpoint's chat template (Jinja) to the few strings around the messages of a conversation.

A template that cannot be reduced does not stop a build: the bundle has none, and a note gives the reason.
`kvexport.model.jinja_sandbox` renders templates; `kvexport.bundle.chat_format` renders the reduced form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvexport.bundle.chat_format import Chat
from kvexport.model.chat_template import read_chat_template, special_tokens
from kvexport.model.jinja_sandbox import DATE, RenderedChat, TemplateFailed, render

# Contents of a conversation that can be found again in the rendered text: system, users, assistants.
_MARKS = {
    "S": "kvxsystemq",
    "U1": "kvxfirstq",
    "A1": "kvxsecondq",
    "U2": "kvxthirdq",
    "A2": "kvxfourthq",
    "U3": "kvxfifthq",
}
_Messages = list[dict[str, str]]
ChatSample = tuple[tuple[dict[str, str], ...], str]  # the messages of a conversation, and their rendered text


@dataclass(frozen=True)
class ReducedTemplate:
    """A reduced chat template.

    Attributes:
        chat: the reduced form; None: there is no template, or it cannot be reduced.
        samples: conversations with the text that the template renders.
        notes: messages for the user.
    """

    chat: Chat | None
    samples: tuple[ChatSample, ...]
    notes: tuple[str, ...]


def reduce_chat_template(checkpoint: Path) -> ReducedTemplate:
    """Reduce the checkpoint's chat template, if it has one."""
    try:
        template = read_chat_template(checkpoint)
        if template is None:
            return ReducedTemplate(None, (), ())
        return _reduce(template, special_tokens(checkpoint))
    except (TemplateFailed, ImportError, OSError, ValueError, RecursionError) as error:
        note = (
            f"the chat template cannot be reduced, so the bundle has none: {error}. Text generation is not "
            "affected"
        )
        return ReducedTemplate(None, (), (note,))


def _reduce(template: str, tokens: Mapping[str, str]) -> ReducedTemplate:
    """Render a conversation of marks, cut it at the marks, and check the pieces on other conversations."""
    marked = _conversation(**_MARKS)
    samples = [_conversation(**contents) for contents in _SAMPLES]
    conversations = [marked, marked[1:], *samples, *(sample[1:] for sample in samples)]
    rendered, uses_date = render(template, tokens, conversations)
    (with_system, without_system), rest = rendered[:2], rendered[2:]
    chat = _cut_at_marks(without_system)
    around_system = _cut_around_system(with_system)
    # The contents of the last sample have white space at both ends.
    strips = rest[-1].text == replace(chat, strips=True).conversation(conversations[-1])
    chat = replace(chat, strips=strips)
    pairs = list(zip(conversations[2:], rest, strict=True))
    count = len(_SAMPLES)
    checked, notes = _check_same(chat, pairs[count:]), []
    try:
        if around_system is None:
            raise ValueError(with_system.error or "it is not written before the conversation")
        chat = replace(chat, begin_system=around_system)
        checked += _check_same(chat, pairs[: count - 1])
    except ValueError as error:
        chat = replace(chat, begin_system=None)
        notes.append(
            f"the chat template's system prompt cannot be reduced: {error}. The bundle does not accept "
            "system prompts"
        )
    if uses_date:
        notes.append(f"the chat template contains the current date: the bundle always uses {DATE:%d %B %Y}")
    return ReducedTemplate(chat, tuple(checked), tuple(notes))


def _cut_at_marks(rendered: RenderedChat) -> Chat:
    """The pieces between the marks of a conversation without a system prompt.

    Raises:
        ValueError: the text is not the same few pieces in every turn.
    """
    if rendered.text is None:
        raise ValueError(rendered.error)
    pieces, rest = [], rendered.text
    for mark in (_MARKS[name] for name in ("U1", "A1", "U2", "A2", "U3")):
        before, separator, rest = rest.partition(mark)
        if not separator or mark in rest:
            raise ValueError("it does not write every message exactly once and in order")
        pieces.append(before)
    begin, answered, following, *later = pieces
    if later != [answered, following] or not answered.startswith(rest):
        raise ValueError("it does not write all turns in the same way")
    return Chat(begin, None, rest, answered[len(rest) :], following, strips=False)


def _cut_around_system(rendered: RenderedChat) -> tuple[str, str] | None:
    if rendered.text is None:
        return None
    before, system, rest = rendered.text.partition(_MARKS["S"])
    after, first_user, _ = rest.partition(_MARKS["U1"])
    return (before, after) if system and first_user else None


def _check_same(chat: Chat, pairs: Sequence[tuple[_Messages, RenderedChat]]) -> list[ChatSample]:
    """Compare the reduced form with the template, and return the conversations with their text.

    Raises:
        ValueError: a text differs.
    """
    for messages, rendered in pairs:
        if rendered.text is None:
            raise ValueError(rendered.error)
        reduced = chat.conversation(messages)
        if reduced != rendered.text:
            at = next(
                (i for i, (a, b) in enumerate(zip(reduced, rendered.text, strict=False)) if a != b),
                min(len(reduced), len(rendered.text)),
            )
            raise ValueError(
                f"it writes {rendered.text[at : at + 40]!r} where the reduced form writes "
                f"{reduced[at : at + 40]!r}"
            )
    return [(tuple(messages), rendered.text or "") for messages, rendered in pairs]


def _conversation(S: str, U1: str, **turns: str) -> _Messages:
    """A system message, a user message, and then assistant and user messages in turn."""
    messages = [{"role": "system", "content": S}, {"role": "user", "content": U1}]
    for name, content in turns.items():
        messages.append({"role": "assistant" if name.startswith("A") else "user", "content": content})
    return messages


# Conversations that the reduced form must render as the template does; the last one has white space around
# its contents.
_SAMPLES = (
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
