"""The window of text whose attention maps are shown, and its tokens as a person reads them.

Knows where the text comes from and the tokenizer; nothing of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kvexport.calibrate import Recipe, calibration_windows, recipe_for
from kvexport.calibrate.text import read_text, read_tokenizer, tokenize
from kvexport.errors import UsageError
from kvexport.model.decoder import Decoder

_TOKENIZER = "tokenizer.json"


def shown_window(
    decoder: Decoder,
    checkpoint: Path,
    text: Path | None,
    tokens: int,
    recipe: Recipe,
    windows: Tensor,
    advance: Callable[[], None],
) -> Tensor:
    """Token ids [tokens] int64, fewer where the text or the calibration windows have fewer.

    The beginning of `text`. Without one, what the model samples at the trained temperature with the seed after the
    recipe's; or the beginning of the last calibration window, which no fit sees, where calibration samples nothing.

    Raises:
        UsageError: the text is empty, or not of the model's vocabulary.
    """
    if text is not None:
        return _beginning(decoder, checkpoint, text, tokens)
    if recipe.source == "self":
        own = recipe_for("self", samples=1, length=min(tokens, recipe.length), seed=recipe.seed + 1)
        return calibration_windows(decoder, checkpoint, own, advance)[0]
    return windows[-1, :tokens]


def _beginning(decoder: Decoder, checkpoint: Path, text: Path, tokens: int) -> Tensor:
    ids = tokenize(checkpoint, read_text(text))[: min(tokens, decoder.dims.max_positions or tokens)]
    if len(ids) < 2:
        raise UsageError(
            f"the text {text} is too short for an attention map",
            got=f"{len(ids)} tokens",
            expected="2 or more",
        )
    if max(ids) >= decoder.dims.vocab_size:
        raise UsageError(
            "the tokenizer makes token ids that the model does not have",
            got=max(ids),
            expected=f"below {decoder.dims.vocab_size}",
            fix="put the model's own tokenizer.json beside its weights",
        )
    return torch.tensor(ids)


def token_texts(checkpoint: Path, ids: Sequence[int]) -> list[str]:
    """Each token's own text; its name in the vocabulary where it is part of a character, its id without a tokenizer.json."""
    path = checkpoint / _TOKENIZER
    if not path.exists():
        return [str(each) for each in ids]
    tokenizer = read_tokenizer(path)

    def text(token: int) -> str:
        decoded: str = tokenizer.decode([token], skip_special_tokens=False)
        return decoded if decoded and "\ufffd" not in decoded else tokenizer.id_to_token(token) or str(token)

    return [text(each) for each in ids]
