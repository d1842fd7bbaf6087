"""Calibration windows of token ids from a recipe: shipped text, sampled from the model, random, or a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kvexport.calibrate.mixed import SHIPPED_TEXT, mixed_tokens, reason_against
from kvexport.calibrate.recipe import Recipe
from kvexport.calibrate.sampling import can_sample, sample_windows
from kvexport.calibrate.text import read_text, spread_windows, tokenize
from kvexport.errors import UsageError
from kvexport.model.decoder import Decoder
from kvexport.model.tokenizer_json import NoTokenizer

NO_MEMORY = "the model does not fit into memory to sample it"


def calibration_windows(
    decoder: Decoder, checkpoint: Path, recipe: Recipe, advance: Callable[[], None] = lambda: None
) -> Tensor:
    """Make the calibration windows of a recipe.

    Args:
        decoder: the trained model.
        checkpoint: its directory, for tokenizer and chat template.
        recipe: source, number and length of the windows.
        advance: called once per sampling step.

    Returns:
        Token ids [N, length] int64; N is `recipe.samples`, or less if the text is too short.

    Raises:
        NoTokenizer: the recipe names a text, and the checkpoint has no usable tokenizer.
        UsageError: the text is shorter than one window, or the length exceeds the model's positions.
        CannotRunHere: the source is 'self' and the model does not fit into memory.
    """
    recipe = recipe.fitted(decoder.dims.max_positions)
    sampled = torch.empty(0, recipe.length, dtype=torch.int64)
    if recipe.sampled_windows:
        sampled = sample_windows(
            decoder, recipe.sampled_windows, recipe.length, recipe.temperatures, recipe.seed, advance
        )
    if recipe.source == "self":
        return sampled
    if recipe.source == "random":
        generator = torch.Generator().manual_seed(recipe.seed)
        return torch.randint(decoder.dims.vocab_size, (recipe.samples, recipe.length), generator=generator)
    if recipe.source == "mixed":
        ids = mixed_tokens(checkpoint, recipe.seed)
        require_in_vocabulary(ids, decoder.dims.vocab_size)
        shipped = recipe.samples - len(sampled)
        windows = spread_windows(ids, shipped, recipe.length, recipe.seed, SHIPPED_TEXT)
        if decoder.bos_token_id is not None and not len(sampled):
            # as prompts of deployed models and sampled windows begin
            windows[::4, 0] = decoder.bos_token_id
        windows = torch.cat((windows, sampled))
        return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(recipe.seed))]
    assert recipe.file is not None
    text = read_text(recipe.file)
    try:
        ids = tokenize(checkpoint, text)
    except NoTokenizer as error:
        fix = f"{error.fix}, or use --calibration self or random"
        raise NoTokenizer(error.what, got=error.got, expected=error.expected, fix=fix) from error
    require_in_vocabulary(ids, decoder.dims.vocab_size)
    return spread_windows(
        ids, recipe.samples, recipe.length, recipe.seed, f"the calibration text {recipe.file}"
    )


def usable_recipe(recipe: Recipe, decoder: Decoder, checkpoint: Path) -> Recipe:
    """The recipe, or one that samples the model where the shipped text is no text of its kind; without
    sampled windows if the model does not fit into memory.

    Raises:
        UsageError: the tokenizer cannot be read.
    """
    if recipe.source != "mixed":
        return recipe
    reason = reason_against(checkpoint, decoder)
    if reason is not None:
        return recipe.from_model(reason)
    if recipe.sampled_windows and not can_sample(decoder, recipe.sampled_windows, recipe.length):
        return replace(recipe, sampled=0.0, reason=NO_MEMORY)
    return recipe


def require_in_vocabulary(ids: list[int], vocab_size: int) -> None:
    """Raise UsageError if a token id of the tokenizer is not in the model's vocabulary."""
    if ids and max(ids) >= vocab_size:
        raise UsageError(
            "token ids of the tokenizer must be in the model's vocabulary",
            got=max(ids),
            expected=f"below {vocab_size}",
            fix="replace tokenizer.json by that of the model",
        )
