"""Saved calibration: token windows and moments of each layer, in a directory for one checkpoint.

statistics.json          format, sha256 of the checkpoint, recipe, sha256 of tokens.safetensors
tokens.safetensors       `tokens` [N, length] int32
layer-00000.safetensors  the tensors of `Moments`, one file per layer
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvexport.calibrate.moments import MOMENT_NAMES, Moments
from kvexport.calibrate.recipe import Recipe
from kvexport.errors import UsageError, reason_of
from kvexport.files.hashing import sha256_of
from kvexport.files.safetensors_io import save_tensors
from kvexport.files.schema import Table

FORMAT = 2  # format 1 contained moments of rotated keys
_HEADER, _TOKENS = "statistics.json", "tokens.safetensors"


def save_header(directory: Path, checkpoint_sha256: str, recipe: Recipe, windows: Tensor) -> None:
    """Start a statistics directory: write its header and its token windows [N, length] int64."""
    save_tensors({"tokens": windows.to(torch.int32)}, directory / _TOKENS)
    header = {
        "format": FORMAT,
        "checkpoint": checkpoint_sha256,
        "recipe": recipe.to_json(),
        "tokens_sha256": sha256_of(directory / _TOKENS),
    }
    (directory / _HEADER).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")


def save_moments(directory: Path, index: int, moments: Moments) -> None:
    """Write the moments of one layer."""
    save_tensors({name: getattr(moments, name) for name in MOMENT_NAMES}, directory / _layer_file(index))


class Statistics:
    """A statistics directory, opened for one checkpoint.

    Attributes:
        windows: token windows [N, length] int64.
        header: the parsed statistics.json.
    """

    def __init__(self, directory: Path, checkpoint_sha256: str) -> None:
        """
        Args:
            directory: written by `kvexport calibrate`.
            checkpoint_sha256: digest of the checkpoint to be converted.

        Raises:
            UsageError: the directory has no statistics, another format, a damaged file, or statistics of
                another checkpoint.
        """
        self._directory = directory
        remedy = f"make them: kvexport calibrate CHECKPOINT -o {directory}"
        try:
            text = (directory / _HEADER).read_bytes()
        except OSError as error:
            raise UsageError(
                f"{directory} must be a directory of calibration statistics: {reason_of(error)}", fix=remedy
            ) from error
        table = Table.from_json(text, str(directory / _HEADER), fix=remedy)
        if not table.has("format") or table.value("format") != FORMAT:
            raise UsageError(
                "the statistics must have the format that this version reads",
                got=table.mapping().get("format"),
                expected=FORMAT,
                fix=remedy,
            )
        if table.string("checkpoint") != checkpoint_sha256:
            raise UsageError(
                "the statistics must be those of the checkpoint",
                got=f"statistics of sha256 {table.string('checkpoint')}",
                expected=f"statistics of sha256 {checkpoint_sha256}",
                fix=remedy,
            )
        table.table("recipe")
        tokens = self._read(_TOKENS)
        if table.string("tokens_sha256") != sha256_of(directory / _TOKENS):
            raise UsageError(
                f"{directory / _TOKENS} must be unchanged since it was written: its sha256 differs",
                fix=remedy,
            )
        self.header: dict[str, Any] = dict(table.mapping())
        self.windows = tokens["tokens"].long()

    def moments(self, index: int) -> Moments:
        """Read the moments of one layer.

        Raises:
            UsageError: the file is missing or damaged.
        """
        tensors = self._read(_layer_file(index))
        if set(tensors) != set(MOMENT_NAMES):
            raise UsageError(
                f"{self._directory / _layer_file(index)} must contain the moments of a layer",
                got=", ".join(sorted(tensors)),
                expected=", ".join(sorted(MOMENT_NAMES)),
            )
        return Moments(**tensors)

    def _read(self, name: str) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self._directory / name)
        except (OSError, SafetensorError) as error:
            raise UsageError(
                f"the statistics file {self._directory / name} must be readable: {reason_of(error)}"
            ) from error


def _layer_file(index: int) -> str:
    return f"layer-{index:05d}.safetensors"
