"""The calibration text that is shipped (`calibration/*.txt`): prose, dialogues, code, several languages.

`classics` and `reference` are excerpts of works in the public domain, listed in `calibration/SOURCES.md`. The
other documents were written for this project; persons, places and figures in them are largely invented. The
kinds are mixed because errors are largest for text unlike that of the calibration.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kvexport.calibrate import windows as attention_windows
from kvexport.calibrate.text import spread_windows, tokenize
from kvexport.files.resources import resource
from kvexport.model import reference
from kvexport.model.chat_template import read_chat_template, special_tokens
from kvexport.model.decoder import Decoder
from kvexport.model.jinja_sandbox import TemplateFailed, render
from kvexport.model.tokenizer_json import NoTokenizer

KINDS = ("articles", "prose", "dialogue", "languages", "code", "classics", "reference")
SHIPPED_TEXT = "the shipped calibration text"
_SEPARATOR = "\n-----\n"  # between the documents of a file
_TURN = re.compile(r"(?:\A|\n\n)(System|User|Assistant): ")
_COMMONEST = 0.5  # share of one token; in English text it is 0.05, by characters 0.2
_CHECKED, _CHECKED_LENGTH = 16, 256  # windows on which the model is tried, and their length in tokens
_CHANCE = 0.8  # share of ln(vocabulary), the cross-entropy of guessing


def mixed_tokens(checkpoint: Path, seed: int) -> list[int]:
    """Token ids of all documents, whose order depends on the seed.

    Conversations are rendered by the chat template of the checkpoint, if it has one.

    Raises:
        NoTokenizer: the checkpoint has no tokenizer.json, and none can be converted.
        UsageError: the tokenizer cannot be read.
    """
    texts = _documents(checkpoint)
    random.Random(seed).shuffle(texts)
    return tokenize(checkpoint, "".join(texts))


def reason_against(checkpoint: Path, decoder: Decoder) -> str | None:
    """Why the shipped text is no calibration text for the model; None if it is.

    Runs the model over 16 windows of it, one layer in memory at a time.

    Args:
        checkpoint: directory of the model, for tokenizer and chat template.
        decoder: the trained model.

    Raises:
        UsageError: the tokenizer cannot be read.
    """
    vocab_size = decoder.dims.vocab_size
    try:
        ids = mixed_tokens(checkpoint, seed=0)
    except NoTokenizer:
        return "the checkpoint has no usable tokenizer"
    length = min(_CHECKED_LENGTH, decoder.dims.max_positions or _CHECKED_LENGTH)
    if len(ids) < length:
        return f"the tokenizer encodes the shipped calibration text as {len(ids)} tokens"
    if max(ids) >= vocab_size:
        return f"the tokenizer has token ids above the model's vocabulary of {vocab_size}"
    share = Counter(ids).most_common(1)[0][1] / len(ids)
    if share > _COMMONEST:
        return f"the tokenizer encodes {share:.0%} of the shipped calibration text as one token"
    loss = _cross_entropy(decoder, spread_windows(ids, _CHECKED, length, 0, SHIPPED_TEXT))
    if not loss <= _CHANCE * math.log(vocab_size):  # also of logits that are not finite
        return f"the model cannot predict the shipped text (cross-entropy {loss:.1f} nats per token)"
    return None


@torch.no_grad()
def _cross_entropy(decoder: Decoder, windows: Tensor) -> float:
    """Mean cross-entropy of the model on windows [N, S], in nats per token."""
    x = reference.embed(decoder.embedding, windows)
    for layer in decoder.layers:
        attention_windows.advance(layer, x)
    targets, total = windows.to(x.device), 0.0
    for stream, target in zip(x, targets, strict=True):
        logits = reference.logits(decoder, stream[:-1]).float()
        total += float(torch.nn.functional.cross_entropy(logits, target[1:]))
    return total / len(windows)


def _documents(checkpoint: Path) -> list[str]:
    documents = [document for kind in KINDS for document in documents_of(kind)]
    conversations = [messages_of(document) for document in documents]
    rendered = iter(_render(checkpoint, [each for each in conversations if each]))
    texts = []
    for document, messages in zip(documents, conversations, strict=True):
        text = next(rendered) if messages else None
        texts.append(f"{document}\n\n" if text is None else text)
    return texts


def documents_of(kind: str) -> list[str]:
    """The documents of one file."""
    text = resource("calibration", f"{kind}.txt").read_text(encoding="utf-8")
    return text.removesuffix("\n").split(_SEPARATOR)


def messages_of(document: str) -> list[Mapping[str, str]]:
    """The messages of a document whose paragraphs begin with a role, such as `User: `; otherwise none."""
    before, *parts = _TURN.split(document)
    if before:
        return []
    return [
        {"role": role.lower(), "content": content}
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _render(checkpoint: Path, conversations: Sequence[Sequence[Mapping[str, str]]]) -> list[str | None]:
    """The text of each conversation; None where there is no chat template, or it cannot render it."""
    nothing: list[str | None] = [None] * len(conversations)
    try:
        template = read_chat_template(checkpoint)
        if template is None:
            return nothing
        tokens = special_tokens(checkpoint)
        rendered, _ = render(template, tokens, conversations, add_generation_prompt=False)
    except (TemplateFailed, ImportError, OSError, ValueError, RecursionError):  # the build notes it
        return nothing
    return [each.text for each in rendered]
