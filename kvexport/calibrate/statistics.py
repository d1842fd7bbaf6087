"""Saved calibration: the token windows and each layer's moments, in a directory that knows its checkpoint.

Knows files and digests; must not know how moments are made or used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvexport.calibrate.moments import MOMENT_NAMES, Moments
from kvexport.calibrate.recipe import Recipe
from kvexport.errors import UsageError
from kvexport.files.hashing import sha256_of
from kvexport.files.safetensors_io import save_tensors

FORMAT = 2  # 1 held moments of rotated keys
_HEADER, _TOKENS = "statistics.json", "tokens.safetensors"


def save_header(directory: Path, checkpoint_sha256: str, recipe: Recipe, windows: Tensor) -> None:
    """Begin a statistics directory with its token windows [N, length]."""
    save_tensors({"tokens": windows.to(torch.int32)}, directory / _TOKENS)
    header = {
        "format": FORMAT,
        "checkpoint": checkpoint_sha256,
        "recipe": recipe.to_json(),
        "tokens_sha256": sha256_of(directory / _TOKENS),
    }
    (directory / _HEADER).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")


def save_moments(directory: Path, index: int, moments: Moments) -> None:
    """Add the moments of one layer."""
    save_tensors({name: getattr(moments, name) for name in MOMENT_NAMES}, directory / _layer_file(index))


class Statistics:
    """A statistics directory, for one checkpoint only.

    Attributes:
        windows: token windows [N, length] int64.
        header: the parsed statistics.json.

    Raises (on construction):
        UsageError: not statistics, of another format, damaged, or taken from another checkpoint.
    """

    def __init__(self, directory: Path, checkpoint_sha256: str) -> None:
        self._directory = directory
        remedy = f"make them: kvexport calibrate CHECKPOINT -o {directory}"
        try:
            self.header: dict[str, Any] = json.loads((directory / _HEADER).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{directory} holds no calibration statistics: {error}", fix=remedy) from error
        if not isinstance(self.header, dict):
            raise UsageError(f"{directory / _HEADER} is no header of calibration statistics", fix=remedy)
        if self.header.get("format") != FORMAT:
            raise UsageError(
                "the statistics are of a format that this version does not read",
                got=self.header.get("format"),
                expected=FORMAT,
                fix=remedy,
            )
        if self.header.get("checkpoint") != checkpoint_sha256:
            raise UsageError(
                "the statistics belong to another checkpoint",
                got=f"sha256 {self.header.get('checkpoint')}",
                expected=f"sha256 {checkpoint_sha256}",
                fix=remedy,
            )
        tokens = self._read(_TOKENS)
        if self.header.get("tokens_sha256") != sha256_of(directory / _TOKENS):
            raise UsageError(
                f"{directory / _TOKENS} is not what {_HEADER} describes: damaged or exchanged", fix=remedy
            )
        self.windows = tokens["tokens"].long()

    def moments(self, index: int) -> Moments:
        """The moments of one layer."""
        found = self._read(_layer_file(index))
        if set(found) != set(MOMENT_NAMES):
            raise UsageError(
                f"{self._directory / _layer_file(index)} lacks moments", got=", ".join(sorted(found))
            )
        return Moments(**found)

    def _read(self, name: str) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self._directory / name)
        except (OSError, SafetensorError) as error:
            raise UsageError(
                f"the statistics file {self._directory / name} cannot be read: {error}"
            ) from error


def _layer_file(index: int) -> str:
    return f"layer-{index:05d}.safetensors"
