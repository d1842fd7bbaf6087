"""Text to token ids, and token ids to text as they come; knows tokenizers, nothing of models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvexport.bundle import TOKENIZER_FILE, Bundle
from kvexport.errors import BundleError, UsageError

_INCOMPLETE = "\ufffd"  # what a tokenizer decodes the first bytes of a longer character to
_CONTEXT = 8  # tokens before the new ones that decoding must see to space them right
_LONGEST = 4  # tokens of one character, where each holds a byte


def tokenizer_of(bundle: Bundle) -> Tokenizer | None:
    """The bundle's tokenizer, if it has one.

    Raises:
        BundleError: tokenizer.json cannot be read.
    """
    if TOKENIZER_FILE not in bundle.files:
        return None
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(bundle.path / TOKENIZER_FILE))
    except Exception as error:  # the only class that tokenizers raises
        raise BundleError(
            f"{TOKENIZER_FILE} of the bundle {bundle.path} cannot be read: {error}",
            fix="pip install --upgrade tokenizers, or restore tokenizer.json in the checkpoint and build again",
        ) from error
    backend.no_truncation()  # settings of the training run, which some checkpoints carry
    backend.no_padding()
    return Tokenizer(backend)


class Tokenizer:
    """A `tokenizers.Tokenizer`."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the tokenizer puts around a text.

        Raises:
            UsageError: half a surrogate pair, which is no character.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError("the prompt is not valid text", seen=repr(text[error.start : error.end])) from error
        return list(self._backend.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))


class TextStream:
    """Text of tokens that come one by one: whole characters only, with the spaces that decoding all at once gives."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        """A stream of what follows the prompt."""
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the last tokens, from a character's first on
        self._told = ""  # their text, as far as it was given out
        self._boundary = 0  # how many of them were there when a character last ended
        for start in range(max(0, len(prompt) - _CONTEXT), max(-1, len(prompt) - _CONTEXT - _LONGEST), -1):
            self._ids = list(prompt[start:])
            text = tokenizer.decode(self._ids)
            self._told = text.rstrip(_INCOMPLETE)
            if not text.startswith(_INCOMPLETE):
                break

    def add(self, token: int) -> str:
        """Text that this token completes; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        whole = text.rstrip(_INCOMPLETE)
        if len(whole) <= len(self._told):
            return ""
        piece, self._told = whole[len(self._told) :], whole
        if whole == text:
            self._forget()
        return piece

    def end(self) -> str:
        """What is left, an incomplete character included."""
        return self._tokenizer.decode(self._ids)[len(self._told) :]

    def _forget(self) -> None:
        """At a character's end: drop tokens that no later one needs to be decoded with, if there are enough of them."""
        if len(self._ids) - self._boundary >= _CONTEXT:
            self._ids = self._ids[self._boundary :]
            self._told = self._tokenizer.decode(self._ids)
            self._boundary = len(self._ids)
        elif not self._boundary:
            self._boundary = len(self._ids)
