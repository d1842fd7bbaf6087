"""Token ids to text, as they come; knows tokenizers, nothing of models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvexport.bundle import TOKENIZER_FILE
from kvexport.errors import UsageError

_INCOMPLETE = "\ufffd"  # what a tokenizer decodes the first bytes of a longer character to


class Text:
    """The bundle's tokenizer."""

    def __init__(self, bundle: Path) -> None:
        from tokenizers import Tokenizer

        if not (bundle / TOKENIZER_FILE).exists():
            raise UsageError(
                f"the bundle {bundle} has no {TOKENIZER_FILE}, so it takes and gives token ids only",
                fix="give token ids, or add tokenizer.json to the checkpoint and build again",
            )
        self._tokenizer = Tokenizer.from_file(str(bundle / TOKENIZER_FILE))

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the tokenizer puts around a text."""
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def stream(self, prompt: Sequence[int]) -> TextStream:
        """A stream of what follows the prompt."""
        return TextStream(self, prompt)


class TextStream:
    """Text of tokens that come one by one: whole characters only, with the spaces that decoding all at once gives."""

    _CONTEXT = 8  # tokens before the new ones that decoding must see to space them right

    def __init__(self, text: Text, prompt: Sequence[int]) -> None:
        self._text = text
        self._ids = list(prompt[-self._CONTEXT :])
        self._told = len(self._ids)  # ids whose text was given out

    def add(self, token: int) -> str:
        """Text that this token completes; empty while a character is incomplete."""
        self._ids.append(token)
        piece = self._untold()
        if piece.endswith(_INCOMPLETE):
            return ""
        self._tell()
        return piece

    def end(self) -> str:
        """What is left, an incomplete character included."""
        piece = self._untold()
        self._tell()
        return piece

    def _untold(self) -> str:
        before = self._text.decode(self._ids[: self._told])
        return self._text.decode(self._ids)[len(before) :]

    def _tell(self) -> None:
        self._ids = self._ids[-self._CONTEXT :]
        self._told = len(self._ids)
