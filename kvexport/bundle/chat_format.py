"""A chat template's reduced form: the strings around what people and the model say; knows no Jinja and no tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvexport.errors import UsageError


@dataclass(frozen=True)
class Chat:
    """A conversation is its beginning, then user, `generate`, `answer`, assistant, `next`, user, `generate`, and so on.

    Attributes:
        begin: before the first user's turn, where there is no system prompt.
        begin_system: around a system prompt, in place of `begin`; None: the template takes none.
        generate: from the end of a user's turn to where the assistant answers.
        answer: what the assistant itself is to write before its words, such as a space; never fed.
        next: from the end of an assistant's turn to where the next user's begins.
        strips: contents lose the white space at both ends first.
    """

    begin: str
    begin_system: tuple[str, str] | None
    generate: str
    answer: str
    next: str
    strips: bool

    def turn(self, text: str, system: str | None, begins: bool) -> str:
        """What to feed for a user's turn, up to where the assistant's begins; `begins`: it is the conversation's first.

        Raises:
            UsageError: a system prompt later than that, or with a template that takes none.
        """
        if not begins:
            if system is not None:
                raise UsageError(
                    "a system prompt belongs at the beginning of a conversation",
                    got=system[:80],
                    fix="leave it out, or begin a new conversation: session.new_cache()",
                )
            return self.next + self._said(text) + self.generate
        if system is None:
            return self.begin + self._said(text) + self.generate
        if self.begin_system is None:
            raise UsageError(
                "the model's chat template takes no system prompt that could be put before a conversation",
                got=system[:80],
                fix="leave it out, or put it at the beginning of the user's text",
            )
        before, after = self.begin_system
        return before + self._said(system) + after + self._said(text) + self.generate

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Messages with `role` and `content`, of which the last is a user's, up to where the assistant answers."""
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        first, *rest = messages[system is not None :]
        text = self.turn(first["content"], system, True)
        for message in rest:
            said = message["content"]
            text += (
                self.answer + self._said(said)
                if message["role"] == "assistant"
                else self.turn(said, None, False)
            )
        return text

    def _said(self, content: str) -> str:
        return content.strip() if self.strips else content
