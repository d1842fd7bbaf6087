"""From a recipe to the windows of token ids that calibration runs; the one place that knows all sources."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kvexport.calibrate.recipe import Recipe
from kvexport.calibrate.sampling import sample_windows
from kvexport.calibrate.text import read_text, spread_windows, tokenize
from kvexport.errors import UsageError
from kvexport.model.decoder import Decoder


def calibration_windows(
    decoder: Decoder, checkpoint: Path, recipe: Recipe, advance: Callable[[], None] = lambda: None
) -> Tensor:
    """Windows [N, length] of int64 token ids; N is `recipe.samples`, or fewer where the text has fewer.

    Raises:
        UsageError: the text is empty, shorter than one window, or the length exceeds the model's positions.
        CannotRunHere: 'self', and the model does not fit in memory.
    """
    limit = decoder.dims.max_positions
    if limit is not None and recipe.length > limit:
        raise UsageError(
            "--length exceeds the positions that the model was trained for",
            got=recipe.length,
            expected=f"at most {limit}",
        )
    if recipe.source == "self":
        return sample_windows(
            decoder, recipe.samples, recipe.length, recipe.temperatures, recipe.seed, advance
        )
    if recipe.source == "random":
        generator = torch.Generator().manual_seed(recipe.seed)
        return torch.randint(decoder.dims.vocab_size, (recipe.samples, recipe.length), generator=generator)
    assert recipe.file is not None
    ids = tokenize(checkpoint, read_text(recipe.file))
    _require_known(ids, decoder.dims.vocab_size)
    return spread_windows(
        ids, recipe.samples, recipe.length, recipe.seed, f"the calibration text {recipe.file}"
    )


def _require_known(ids: list[int], vocab_size: int) -> None:
    if ids and max(ids) >= vocab_size:
        raise UsageError(
            "the tokenizer makes token ids that the model does not have",
            got=max(ids),
            expected=f"below {vocab_size}",
            fix="put the model's own tokenizer.json beside its weights",
        )
