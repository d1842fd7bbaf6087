"""A chat template reduced to the strings around user messages and answers; needs no template engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvexport.errors import UsageError


@dataclass(frozen=True)
class Chat:
    """The strings of a chat template.

    A conversation is: `begin`, user, `generate`, `answer`, assistant, `next`, user, `generate`, and so on.

    Attributes:
        begin: before the first user message if there is no system prompt.
        begin_system: before and after a system prompt, in place of `begin`; None: the template has no system
            prompt.
        generate: after a user message, up to where the assistant answers.
        answer: what the template puts before an answer, such as a space; the model generates it, so it is not
            fed.
        next: after an answer, up to the next user message.
        strips: white space at both ends of every message is removed first.
    """

    begin: str
    begin_system: tuple[str, str] | None
    generate: str
    answer: str
    next: str
    strips: bool

    def turn(self, text: str, system: str | None, starts: bool) -> str:
        """Format a user message, from the end of the last answer to the start of the next one.

        Args:
            text: the user's message.
            system: the system prompt.
            starts: the message is the first of the conversation.

        Raises:
            UsageError: a system prompt after the first message, or for a template without one.
        """
        if not starts:
            if system is not None:
                raise UsageError(
                    "a system prompt must be in the first turn of a conversation",
                    got=system[:80],
                    fix="leave it out, or start a new conversation: session.new_cache()",
                )
            return self.next + self._message(text) + self.generate
        if system is None:
            return self.begin + self._message(text) + self.generate
        if self.begin_system is None:
            raise UsageError(
                "the chat template must support a system prompt before the conversation",
                got=system[:80],
                fix="leave it out, or put it at the start of the user's text",
            )
        before, after = self.begin_system
        return before + self._message(system) + after + self._message(text) + self.generate

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Format messages with `role` and `content`, the last by the user, up to the next answer."""
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        first, *rest = messages[system is not None :]
        text = self.turn(first["content"], system, True)
        for message in rest:
            content = message["content"]
            if message["role"] == "assistant":
                text += self.answer + self._message(content)
            else:
                text += self.turn(content, None, False)
        return text

    def _message(self, content: str) -> str:
        return content.strip() if self.strips else content
