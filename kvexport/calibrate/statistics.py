"""Saved calibration and analysis of one checkpoint, in a directory.

statistics.json                format, checkpoint, recipe, capacity, and the sha256 of every other file
tokens.safetensors             `tokens` [N, length] int32
layer-00000.safetensors        the tensors of `Moments`, one file per layer
sensitivity-00000.safetensors  the tensors of `LayerSensitivity`, one file per layer

weights.safetensors            the tensors of `WeightAnalysis`

`kvexport calibrate` writes all but the last. The build cache also has directories with tokens alone, and with
tokens and the analysis of weights.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
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

FORMAT = 4  # format 3 did not weigh tokens
STATISTICS_FILE = "statistics.json"
_TOKENS = "tokens.safetensors"
_WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class StatisticsSource:
    """What statistics were measured on.

    Attributes:
        checkpoint: SHA-256 of the checkpoint.
        name: name of the checkpoint's directory.
        recipe: the calibration recipe.
        capacity: tokens of a sequence for which the sensitivities were analysed.
    """

    checkpoint: str
    name: str
    recipe: Recipe
    capacity: int


class StatisticsWriter:
    """Writes a statistics directory; without the header that `finish` writes it is not valid."""

    def __init__(self, directory: Path, source: StatisticsSource) -> None:
        """
        Args:
            directory: an empty directory.
            source: goes into the header.
        """
        self._directory, self._source = directory, source
        self._sha256: dict[str, str] = {}

    def save_tokens(self, windows: Tensor) -> None:
        """Write the token windows [N, length] int64."""
        self._save(_TOKENS, {"tokens": windows.to(torch.int32)})

    def save_moments(self, index: int, moments: Moments) -> None:
        """Write the moments of one layer."""
        self._save(_moments_file(index), {name: getattr(moments, name) for name in MOMENT_NAMES})

    def save_sensitivity(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors of one layer's sensitivity."""
        self._save(_sensitivity_file(index), tensors)

    def save_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors of the analysis of weights."""
        self._save(_WEIGHTS, tensors)

    def finish(self) -> None:
        """Write the header."""
        header = {
            "format": FORMAT,
            "checkpoint": self._source.checkpoint,
            "name": self._source.name,
            "recipe": self._source.recipe.to_json(),
            "capacity": self._source.capacity,
            "files": dict(sorted(self._sha256.items())),
        }
        (self._directory / STATISTICS_FILE).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")

    def _save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        path = self._directory / name
        save_tensors(tensors, path)
        self._sha256[name] = sha256_of(path)


class Statistics:
    """A statistics directory whose files are all unchanged, opened for one checkpoint.

    Attributes:
        windows: token windows [N, length] int64.
        capacity: tokens of a sequence for which the sensitivities were analysed.
        header: the parsed statistics.json.
    """

    def __init__(self, directory: Path, checkpoint_sha256: str) -> None:
        """
        Args:
            directory: written by `kvexport calibrate`, or an entry of the build cache.
            checkpoint_sha256: digest of the checkpoint to be converted.

        Raises:
            UsageError: the directory has no statistics, another format, a damaged file, or statistics of
                another checkpoint.
        """
        self._directory = directory
        self._remedy = f"make them: kvexport calibrate CHECKPOINT -o {directory}"
        try:
            text = (directory / STATISTICS_FILE).read_bytes()
        except OSError as error:
            raise UsageError(
                f"{directory} must be a directory of calibration statistics: {reason_of(error)}",
                fix=self._remedy,
            ) from error
        table = Table.from_json(text, str(directory / STATISTICS_FILE), fix=self._remedy)
        if not table.has("format") or table.value("format") != FORMAT:
            raise UsageError(
                "the statistics must have the format that this version reads",
                got=table.mapping().get("format"),
                expected=FORMAT,
                fix=self._remedy,
            )
        if table.string("checkpoint") != checkpoint_sha256:
            raise UsageError(
                "the statistics must be those of the checkpoint",
                got=f"statistics of sha256 {table.string('checkpoint')}",
                expected=f"statistics of sha256 {checkpoint_sha256}",
                fix=self._remedy,
            )
        table.table("recipe")
        self.capacity = table.integer("capacity", 1)
        files = table.table("files")
        self._sha256 = {name: files.string(name) for name in files}
        for name in self._sha256:
            if Path(name).name != name:
                raise UsageError(
                    f"{directory / STATISTICS_FILE} must name files of its own directory",
                    got=repr(name),
                    fix=self._remedy,
                )
            self._require_unchanged(name)
        self.header: dict[str, Any] = dict(table.mapping())
        self.windows = self._read(_TOKENS, ["tokens"])["tokens"].long()

    @property
    def tokens_sha256(self) -> str:
        """SHA-256 of the file of token windows."""
        return self._sha256[_TOKENS]

    def has_moments(self, layers: int) -> bool:
        """Whether there are moments of that many layers."""
        return all(_moments_file(index) in self._sha256 for index in range(layers))

    def has_sensitivity(self, layers: int) -> bool:
        """Whether there are sensitivities of that many layers."""
        return all(_sensitivity_file(index) in self._sha256 for index in range(layers))

    def moments(self, index: int) -> Moments:
        """Read the moments of one layer.

        Raises:
            UsageError: the file is missing or damaged.
        """
        return Moments(**self._read(_moments_file(index), MOMENT_NAMES))

    def sensitivity(self, index: int) -> dict[str, Tensor]:
        """Read the tensors of one layer's sensitivity.

        Raises:
            UsageError: the file is missing or damaged.
        """
        return self._read(_sensitivity_file(index))

    @property
    def has_weights(self) -> bool:
        """Whether there is an analysis of weights."""
        return _WEIGHTS in self._sha256

    def weights(self) -> dict[str, Tensor]:
        """Read the tensors of the analysis of weights.

        Raises:
            UsageError: the file is missing or damaged.
        """
        return self._read(_WEIGHTS)

    def _require_unchanged(self, name: str) -> None:
        path = self._directory / name
        try:
            digest = sha256_of(path)
        except OSError as error:
            raise UsageError(
                f"the statistics file {path} must be readable: {reason_of(error)}", fix=self._remedy
            ) from error
        if digest != self._sha256[name]:
            raise UsageError(
                f"{path} must be unchanged since it was written: its sha256 differs", fix=self._remedy
            )

    def _read(self, name: str, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """The tensors of a file; `names` are those that it must have."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._directory / name
        if name not in self._sha256:
            raise UsageError(f"the statistics must have the file {path}", fix=self._remedy)
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UsageError(
                f"the statistics file {path} must be readable: {reason_of(error)}", fix=self._remedy
            ) from error
        if names is not None and set(tensors) != set(names):
            raise UsageError(
                f"{path} must contain the tensors of this format",
                got=", ".join(sorted(tensors)),
                expected=", ".join(sorted(names)),
                fix=self._remedy,
            )
        return tensors


def _moments_file(index: int) -> str:
    return f"layer-{index:05d}.safetensors"


def _sensitivity_file(index: int) -> str:
    return f"sensitivity-{index:05d}.safetensors"
