"""The window of text whose attention maps are shown, and the text of each of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kvexport.calibrate import Recipe, calibration_windows, recipe_for
from kvexport.calibrate.text import read_text, read_tokenizer, tokenize
from kvexport.calibrate.tokens import require_in_vocabulary
from kvexport.errors import UsageError
from kvexport.model.decoder import Decoder
from kvexport.model.tokenizer_json import NoTokenizer


def shown_window(
    decoder: Decoder,
    checkpoint: Path,
    text: Path | None,
    tokens: int,
    recipe: Recipe,
    windows: Tensor,
    advance: Callable[[], None],
) -> Tensor:
    """Token ids of the window, [tokens] int64, or fewer if the source is shorter.

    The beginning of `text`. Without `text`: a sample of the model at temperature 1 with the recipe's seed +
    1, if the recipe samples; otherwise the beginning of the last calibration window, which is held out.

    Args:
        decoder: the trained model.
        checkpoint: its directory, for tokenizer.json.
        text: a text file; None: no text.
        tokens: length of the window.
        recipe: the calibration recipe.
        windows: calibration windows [N, S] int64.
        advance: called once per sampling step.

    Raises:
        UsageError: the text is too short, or the tokenizer is that of another model.
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
            f"the text {text} must have at least 2 tokens for an attention map",
            got=f"{len(ids)} tokens",
            expected="2 or more",
        )
    require_in_vocabulary(ids, decoder.dims.vocab_size)
    return torch.tensor(ids)


def token_texts(checkpoint: Path, ids: Sequence[int]) -> list[str]:
    """Text of each token: its name in the vocabulary if it is part of a character, its id without a
    tokenizer.
    """
    try:
        tokenizer = read_tokenizer(checkpoint)
    except NoTokenizer:
        return [str(each) for each in ids]

    def text(token: int) -> str:
        decoded: str = tokenizer.decode([token], skip_special_tokens=False)
        return decoded if decoded and "\ufffd" not in decoded else tokenizer.id_to_token(token) or str(token)

    return [text(each) for each in ids]
