"""Text files and tokenizers: from a file to windows of token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvexport.errors import UsageError, reason_of
from kvexport.model.tokenizer_json import TOKENIZER_FILE, NoTokenizer, tokenizer_json

_JSON_LINES = (".jsonl", ".ndjson", ".json")


def read_text(path: Path) -> str:
    """Read a text file, or join the `text` fields of a JSON lines file (by its suffix) with blank lines.

    Raises:
        UsageError: the file cannot be read, is not UTF-8, or a line lacks a `text` field that is a string.
    """
    try:
        raw = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the text {path} must be readable: {reason_of(error)}",
            expected="UTF-8 text, or JSON lines with a `text` field",
        ) from error
    if path.suffix not in _JSON_LINES:
        return raw
    lines = enumerate(raw.split("\n"), 1)  # not splitlines: JSON strings may contain other line breaks
    return "\n\n".join(_text_field(path, number, line) for number, line in lines if line.strip())


def _text_field(path: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
        text.encode()  # fails for unpaired surrogates, which tokenizers do not accept
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise UsageError(
            f"{path}, line {number}, must be a JSON object with a `text` field that is a string",
            got=line[:80],
            fix="write one JSON object per line, or rename a plain text to .txt",
        )
    return text


def tokenize(checkpoint: Path, text: str) -> list[int]:
    """Token ids of the whole `text` by the checkpoint's tokenizer, without special tokens.

    Raises:
        NoTokenizer: the checkpoint has no tokenizer.json, none can be converted, or it cannot encode the
            text.
        UsageError: the tokenizer cannot be read.
    """
    tokenizer = read_tokenizer(checkpoint)
    tokenizer.no_truncation()  # tokenizer.json can ask for both
    tokenizer.no_padding()
    try:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    except Exception as error:  # tokenizers raises nothing narrower
        raise NoTokenizer(
            f"the tokenizer of {checkpoint} must encode every text: {error}",
            fix="use the tokenizer.json that the model was trained with",
        ) from error


def read_tokenizer(checkpoint: Path) -> Any:
    """The tokenizer of a checkpoint as `tokenizers.Tokenizer`.

    Raises:
        NoTokenizer: the checkpoint has no tokenizer.json, and none can be converted.
        UsageError: tokenizer.json is not a tokenizer.
    """
    from tokenizers import Tokenizer

    text = tokenizer_json(checkpoint)
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises nothing narrower
        raise UsageError(
            f"{checkpoint / TOKENIZER_FILE} must be a tokenizer: {error}",
            fix="download the model's tokenizer.json again",
        ) from error


def all_windows(ids: list[int], length: int, what: str) -> Tensor:
    """Consecutive windows of token ids, [N, length] int64; an incomplete window at the end is dropped.

    Raises:
        UsageError: the text is shorter than one window; `what` names the text.
    """
    count = len(ids) // length
    if not count:
        raise UsageError(
            f"{what} must be at least as long as one window",
            got=f"{len(ids)} tokens",
            expected=f"{length} tokens or more",
            fix="use a longer text, or a smaller --length",
        )
    return torch.tensor(ids[: count * length]).view(count, length)


def spread_windows(ids: list[int], samples: int, length: int, seed: int, what: str) -> Tensor:
    """At most `samples` of the consecutive windows, drawn uniformly, in random order: [N, length] int64.

    Raises:
        UsageError: the text is shorter than one window; `what` names the text.
    """
    windows = all_windows(ids, length, what)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:samples]]
