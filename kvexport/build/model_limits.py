"""Apply the limits of a model to the options of a build."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from kvexport.bundle.graph_io import DEFAULT_CAPACITY
from kvexport.calibrate import Recipe, usable_recipe
from kvexport.errors import UsageError
from kvexport.model.decoder import Decoder
from kvexport.progress import Progress


def fitted_recipe(recipe: Recipe, decoder: Decoder, checkpoint: Path, progress: Progress) -> Recipe:
    """The recipe with windows that the model has positions for, and with text that it can predict.

    Notes say what was changed.

    Raises:
        UsageError: the model has fewer positions than the requested windows have tokens.
    """
    fitted = recipe.fitted(decoder.dims.max_positions)
    if fitted != recipe:
        progress.note(
            f"calibration windows have {fitted.length} tokens, not {recipe.length}: the model was trained "
            f"for {fitted.length} positions"
        )
    usable = usable_recipe(fitted, decoder, checkpoint)
    if usable.reason is not None:
        what = "sampled from the model" if usable.sampled_windows else "the shipped text alone"
        progress.note(f"calibration text is {what}, because {usable.reason}")
    return usable


def sequence_capacity(most: int | None, requested: int | None = None) -> int:
    """The maximum sequence length: the requested one, or the model's, at most 4096.

    Args:
        most: maximum length that the model supports; None: unbounded.
        requested: None: the default.

    Raises:
        UsageError: the requested one is not positive, or exceeds the model's.
    """
    if requested is None:
        return min(most or DEFAULT_CAPACITY, DEFAULT_CAPACITY)
    if requested < 1 or (most is not None and requested > most):
        raise UsageError(
            "--capacity must be a length that the model supports",
            got=f"{requested} tokens",
            expected=">= 1" if most is None else f"1 to {most} (the positions that the model supports)",
        )
    return requested


def require_healing(steps: int | None, rank: int | None, hidden_size: int, *, compresses: bool) -> None:
    """Check the options of distillation.

    Args:
        steps: number of steps; None: no distillation.
        rank: rank of the adapters; None: no adapters.
        hidden_size: of the model.
        compresses: whether any layer is converted.

    Raises:
        UsageError: there is nothing to distil, or the rank exceeds the hidden size.
    """
    if steps is not None and not compresses:
        raise UsageError(
            "--heal needs compressed layers, and all KV heads are kept",
            got=f"--heal {steps}",
            fix="lower --kv-ratio or --kv-heads, or leave out --heal",
        )
    if rank is not None and rank > hidden_size:
        raise UsageError(
            "--heal-lora must not exceed the model's hidden size", got=rank, expected=f"1 to {hidden_size}"
        )


def require_same_capacity(saved: int, capacity: int) -> None:
    """Check given statistics of a model whose RoPE frequencies depend on the capacity.

    Args:
        saved: capacity of the statistics, in tokens.
        capacity: that of the build.

    Raises:
        UsageError: they differ.
    """
    if saved != capacity:
        raise UsageError(
            "the statistics must be for the capacity of the build: the model's RoPE frequencies depend on it",
            got=f"statistics for {saved} tokens",
            expected=f"statistics for {capacity} tokens",
            fix=f"kvexport calibrate CHECKPOINT -o STATISTICS --capacity {capacity}",
        )


def note_little_text(windows: Tensor, requested: int, key_width: int | None, progress: Progress) -> None:
    """Note that there is less calibration text than requested, or too little to fit keys or to hold some out.

    Args:
        windows: calibration windows [N, length] int64.
        requested: number of windows.
        key_width: numbers that the keys of one token and layer have; None: no keys are fitted.
        progress: shows the notes.
    """
    if len(windows) < requested:
        progress.note(
            f"the calibration text has {len(windows)} windows, fewer than the {requested} requested"
        )
    if key_width is None:
        return
    if windows.numel() < 4 * key_width:
        progress.note(
            f"{windows.numel()} calibration tokens are few for keys of {key_width} numbers: the predicted "
            "errors are too low, and the loss is larger than necessary; use more --samples or a larger "
            "--length"
        )
    if len(windows) == 1:
        progress.note(
            "there is one calibration window, so no tokens are held out: the measured errors and the loss "
            "are on the text that was used to fit; use --samples 2 or more"
        )
