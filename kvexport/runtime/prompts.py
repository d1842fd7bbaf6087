"""Prompts of a session: text or token ids, one or several, formatted by the chat template and tokenized."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kvexport.bundle import Bundle
from kvexport.bundle.text_file import TextFile
from kvexport.errors import UsageError
from kvexport.runtime.cache.sequences import Cache
from kvexport.runtime.core import SessionCore
from kvexport.runtime.tokenizer import Tokenizer, Turn
from kvexport.runtime.types import Ids

Prompt = str | Sequence[int]


class PromptEncoder:
    """The tokenizer and the chat template of a bundle.

    Attributes:
        tokenizer: None if the bundle has none.
    """

    def __init__(self, bundle: Bundle, core: SessionCore, text: TextFile | None, tokenizer: Tokenizer | None):
        """
        Args:
            text: the bundle's text.json, if it has one.
            tokenizer: the bundle's tokenizer, if it has one.
        """
        self._core, self._path, self._bos = core, bundle.path, bundle.model.bos_token_id
        self._chat = None if text is None else text.chat
        self.tokenizer = tokenizer

    def require_tokenizer(self) -> Tokenizer:
        """
        Raises:
            UsageError: the bundle has no tokenizer.
        """
        if self.tokenizer is None:
            raise UsageError(
                f"the bundle {self._path} must have a tokenizer for text",
                fix="pass token ids in Python or C++, or build again from a checkpoint with a tokenizer",
            )
        return self.tokenizer

    def ids(self, prompt: Prompt, cache: Cache | None, row: int) -> Ids:
        """Checked token ids of a prompt, int64 [tokens].

        Args:
            prompt: text or token ids.
            cache: whose sequence the prompt continues; None: it starts one.
            row: index of the sequence in the cache. A text at the start of a sequence gets the tokenizer's
                special tokens.

        Raises:
            UsageError: the bundle has no tokenizer, the text has an unpaired surrogate, or a token id is
                outside the vocabulary.
        """
        return self._core.runner.checked(self._encoded(prompt, cache, row))

    def _encoded(self, prompt: Prompt, cache: Cache | None, row: int) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        tokenizer = self.require_tokenizer()
        sequences = None if cache is None else self._core.sequences(cache)
        if sequences is not None and row < sequences.kv.batch and not sequences.is_empty(row):
            return tokenizer.encode(prompt, special=False)
        ids = tokenizer.encode(prompt, special=not isinstance(prompt, Turn))
        return ids or ([] if self._bos is None else [self._bos])

    def turn(self, text: str, system: str | None, *, starts: bool) -> str:
        """A user message as the chat template formats it; the text itself without a template.

        Raises:
            UsageError: a system prompt where it cannot be used.
        """
        if self._chat is not None:
            return Turn(self._chat.turn(text, system, starts))
        if system is not None:
            raise UsageError(
                f"the bundle {self._path} must have a chat template for a system prompt",
                got=system[:80],
                fix="put it at the beginning of the first message",
            )
        return text


def is_ids(prompt: object) -> bool:
    """Whether it is a sequence of token ids."""
    return isinstance(prompt, Iterable) and all(isinstance(each, (int, np.integer)) for each in prompt)


def batched(prompts: Sequence[Any]) -> Sequence[Any]:
    """A list of prompts, of one or of several.

    Raises:
        UsageError: there is none.
    """
    if len(prompts) == 0:
        raise UsageError("there must be at least one prompt", fix="give at least one token")
    return [prompts] if isinstance(prompts, str) or is_ids(prompts) else prompts
