"""The tokenizer of a bundle.

Text to token ids, and token ids to text, also piece by piece up to a stop text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvexport.bundle import TOKENIZER_FILE, Bundle
from kvexport.bundle.text_file import TextFile
from kvexport.errors import BundleError, CannotRunHere, UsageError
from kvexport.files.malloc import return_freed

_INCOMPLETE = "\ufffd"  # decoded for the first bytes of a character
_CONTEXT = 8  # tokens before the new ones that are decoded with them, for the right spaces
_MAX_PER_CHARACTER = 4  # tokens, if each is one byte


def tokenizer_of(bundle: Bundle, text: TextFile | None) -> Tokenizer | None:
    """Load the bundle's tokenizer and check it with the samples of text.json; None if the bundle has none.

    Args:
        bundle: the bundle.
        text: its text.json, if it has one.

    Raises:
        BundleError: tokenizer.json cannot be read.
        CannotRunHere: the installed `tokenizers` gives other token ids than the one of the build.
    """
    if TOKENIZER_FILE not in bundle.files:
        return None
    tokenizer = read_tokenizer(bundle.path)
    difference = None if text is None else text.difference(tokenizer)
    if difference is not None:
        import tokenizers

        raise CannotRunHere(
            f"the tokenizer of the bundle {bundle.path} must give the token ids of the build",
            got=f"{difference} (tokenizers {tokenizers.__version__})",
            fix=(
                "install the version of tokenizers that the bundle was built with, "
                "or build the bundle again with this one"
            ),
        )
    return tokenizer


def read_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer.json of a folder.

    Raises:
        BundleError: it cannot be read.
    """
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    except Exception as error:  # the only class that tokenizers raises
        raise BundleError(
            f"{TOKENIZER_FILE} of the bundle {folder} must be readable: {error}",
            fix=(
                "pip install --upgrade tokenizers, "
                "or restore tokenizer.json in the checkpoint and build again"
            ),
        ) from error
    backend.no_truncation()  # some checkpoints keep the settings of their training
    backend.no_padding()
    return_freed()  # half of what reading the file takes
    return Tokenizer(backend)


class Turn(str):
    """Text from a chat template: it contains its special tokens, and the tokenizer adds none."""

    __slots__ = ()


class Tokenizer:
    """A tokenizer of the package `tokenizers`."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Tokens that decoding leaves out."""
        added = self._backend.get_added_tokens_decoder()
        return tuple(sorted(token for token, entry in added.items() if entry.special))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: any valid Unicode.
            special: add the tokenizer's special tokens.

        Raises:
            UsageError: the text has an unpaired surrogate.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                "the prompt must be valid Unicode", got=repr(text[error.start : error.end])
            ) from error
        return list(self._backend.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))


class TextStream:
    """Decodes tokens one by one.

    Complete characters only, with the spaces that decoding them together gives.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        """
        Args:
            tokenizer: decodes tokens.
            prompt: the tokens before the first one.
        """
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the last tokens, from the start of a character
        self._returned = ""  # the part of their text that was returned
        self._boundary = 0  # number of tokens when a character last ended
        for start in range(
            max(0, len(prompt) - _CONTEXT), max(-1, len(prompt) - _CONTEXT - _MAX_PER_CHARACTER), -1
        ):
            self._ids = list(prompt[start:])
            text = tokenizer.decode(self._ids)
            self._returned = text.rstrip(_INCOMPLETE)
            if not text.startswith(_INCOMPLETE):
                break

    def add(self, token: int) -> str:
        """The text that a token completes; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        whole = text.rstrip(_INCOMPLETE)
        if len(whole) <= len(self._returned):
            return ""
        piece, self._returned = whole[len(self._returned) :], whole
        if whole == text:
            self._forget()
        return piece

    def end(self) -> str:
        """The remaining text, including an incomplete character."""
        return self._tokenizer.decode(self._ids)[len(self._returned) :]

    def _forget(self) -> None:
        """Drop tokens that are not needed to decode later ones; called at the end of a character."""
        if len(self._ids) - self._boundary >= _CONTEXT:
            self._ids = self._ids[self._boundary :]
            self._returned = self._tokenizer.decode(self._ids)
            self._boundary = len(self._ids)
        elif not self._boundary:
            self._boundary = len(self._ids)


class StopTexts:
    """Returns text up to the first stop text; text that may be the start of one is held back.

    Attributes:
        matched: whether a stop text has appeared.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        """
        Raises:
            UsageError: a stop text is empty.
        """
        if "" in texts:
            raise UsageError("a stop text must not be empty", got=repr(list(texts)), fix="leave it out")
        self._texts, self._pending, self.matched = tuple(texts), "", False

    def add(self, piece: str) -> str:
        """The text that is certain after this piece; empty once a stop text has appeared."""
        if self.matched:
            return ""
        text = self._pending + piece
        ends = [at for each in self._texts if (at := text.find(each)) >= 0]
        self.matched = bool(ends)
        certain = min(ends) if ends else len(text) - self._partial_match(text)
        self._pending = text[certain:]
        return text[:certain]

    def end(self) -> str:
        """The text that was held back, if no stop text has appeared."""
        return "" if self.matched else self._pending

    def _partial_match(self, text: str) -> int:
        """Number of characters at the end of a text that may be the start of a stop text."""
        longest = min(len(text), max(map(len, self._texts), default=1) - 1)
        return next(
            (n for n in range(longest, 0, -1) if any(each.startswith(text[-n:]) for each in self._texts)), 0
        )
