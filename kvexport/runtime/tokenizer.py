"""Text to token ids, and token ids to text as they come, until a text that ends it; knows tokenizers, nothing of models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvexport.bundle.bundle import TOKENIZER_FILE, Bundle
from kvexport.bundle.text_file import TextFile
from kvexport.errors import BundleError, CannotRunHere, UsageError

_INCOMPLETE = "\ufffd"  # what a tokenizer decodes the first bytes of a longer character to
_CONTEXT = 8  # tokens before the new ones that decoding must see to space them right
_LONGEST = 4  # tokens of one character, where each holds a byte


def tokenizer_of(bundle: Bundle, text: TextFile | None) -> Tokenizer | None:
    """The bundle's tokenizer, if it has one, and if it gives the token ids that it gave when the bundle was built.

    Raises:
        BundleError: tokenizer.json or text.json cannot be read.
        CannotRunHere: this machine's `tokenizers` gives other ids than the one of the build.
    """
    if TOKENIZER_FILE not in bundle.files:
        return None
    tokenizer = read_tokenizer(bundle.path)
    differs = None if text is None else text.difference(tokenizer)
    if differs is not None:
        import tokenizers

        raise CannotRunHere(
            f"the tokenizer of the bundle {bundle.path} gives other token ids here than where the bundle was built",
            got=f"{differs} (tokenizers {tokenizers.__version__})",
            fix="install the version of tokenizers that the bundle was built with, or build the bundle again with this one",
        )
    return tokenizer


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer.json of a folder.

    Raises:
        BundleError: it cannot be read.
    """
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    except Exception as error:  # the only class that tokenizers raises
        raise BundleError(
            f"{TOKENIZER_FILE} of the bundle {folder} cannot be read: {error}",
            fix="pip install --upgrade tokenizers, or restore tokenizer.json in the checkpoint and build again",
        ) from error
    backend.no_truncation()  # settings of the training run, which some checkpoints carry
    backend.no_padding()
    return Tokenizer(backend)


class Turn(str):
    """Text that a chat template made: its special tokens are written in it, and the tokenizer adds none."""

    __slots__ = ()


class Tokenizer:
    """A `tokenizers.Tokenizer`."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Tokens that decoding leaves out."""
        added = self._backend.get_added_tokens_decoder()
        return tuple(sorted(token for token, said in added.items() if said.special))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids, with the special tokens that the tokenizer puts around a text, or without.

        Raises:
            UsageError: half a surrogate pair, which is no character.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                "the prompt is not valid text", got=repr(text[error.start : error.end])
            ) from error
        return list(self._backend.encode(text, add_special_tokens=special).ids)

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


class StopTexts:
    """Lets text pass until one of some texts appears in it; what may be the beginning of one waits.

    Attributes:
        found: whether one has appeared.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        """
        Raises:
            UsageError: one of them is empty.
        """
        if "" in texts:
            raise UsageError("a text to stop at is empty", got=repr(list(texts)), fix="leave it out")
        self._texts, self._waiting, self.found = tuple(texts), "", False

    def add(self, piece: str) -> str:
        """What may be said now that this came; nothing once a text was found."""
        if self.found:
            return ""
        text = self._waiting + piece
        ends = [at for each in self._texts if (at := text.find(each)) >= 0]
        self.found = bool(ends)
        certain = min(ends) if ends else len(text) - self._begun(text)
        self._waiting = text[certain:]
        return text[:certain]

    def end(self) -> str:
        """What waited, where no text was found."""
        return "" if self.found else self._waiting

    def _begun(self, text: str) -> int:
        """Characters at the end of a text that may begin one of those to stop at."""
        longest = min(len(text), max(map(len, self._texts), default=1) - 1)
        return next(
            (n for n in range(longest, 0, -1) if any(each.startswith(text[-n:]) for each in self._texts)), 0
        )
