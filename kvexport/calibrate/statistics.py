"""Saved calibration and analysis of one checkpoint, in a directory.

statistics.json                format, checkpoint, recipe, capacity, and the sha256 of every other file
tokens.safetensors             `tokens` [N, length] int32
layer-00000.safetensors        the tensors of `Moments`, one file per layer
sensitivity-00000.safetensors  the tensors of `LayerSensitivity`, one file per layer

weights.safetensors            the tensors of `WeightAnalysis`

`kvexport calibrate` writes all but the last. The build cache also has directories with tokens alone, and with
tokens and the analysis of weights.

The checkpoint is identified by its config and weights. Its tokenizer may change: the tokens have been made.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvexport.calibrate.moments import MOMENT_NAMES, Moments
from kvexport.calibrate.recipe import Recipe, read_recipe
from kvexport.errors import UsageError, reason_of
from kvexport.files.hashing import sha256_of
from kvexport.files.identity import identity_of
from kvexport.files.safetensors_io import save_tensors
from kvexport.files.schema import Table
from kvexport.model.decoder import Decoder, ModelDims

FORMAT = 4  # format 3 did not weigh tokens
STATISTICS_FILE = "statistics.json"
_TOKENS = "tokens.safetensors"
_WEIGHTS = "weights.safetensors"
_LARGEST_CAPACITY = 2**53  # of a model without a maximum: reports divide it


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
        recipe: the calibration recipe; its file has no directory.
        has_analysis: whether there are moments and sensitivities, which are those of all layers.
        has_weights: whether there is an analysis of weights.
    """

    def __init__(self, directory: Path, checkpoint_sha256: str, decoder: Decoder) -> None:
        """
        Args:
            directory: written by `kvexport calibrate`, or an entry of the build cache.
            checkpoint_sha256: digest of the checkpoint to be converted.
            decoder: its model.

        Raises:
            UsageError: the directory has no statistics, another format, a damaged file, or statistics of
                another checkpoint or model.
        """
        self._directory = directory
        self._remedy = f"make them: kvexport calibrate CHECKPOINT -o {directory}"
        table = self._read_header(checkpoint_sha256)
        self.recipe = read_recipe(table.table("recipe"))
        self.capacity = table.integer("capacity", 1, decoder.dims.max_positions or _LARGEST_CAPACITY)
        self._sha256 = self._read_files(table.table("files"), len(decoder.layers))
        for name in self._sha256:
            self._require_unchanged(name)
        self.windows = self._read_windows(decoder.dims)

    def _read_header(self, checkpoint_sha256: str) -> Table:
        path = self._directory / STATISTICS_FILE
        try:
            identity_of(path)
            text = path.read_bytes()
        except OSError as error:
            raise UsageError(
                f"{self._directory} must be a directory of calibration statistics: {reason_of(error)}",
                fix=self._remedy,
            ) from error
        table = Table.from_json(text, str(path), fix=self._remedy)
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
        return table

    def _read_files(self, files: Table, layers: int) -> dict[str, str]:
        """SHA-256 of each file: the tokens, and the analysis of all layers or of weights."""
        analysis = {name(index) for name in (_moments_file, _sensitivity_file) for index in range(layers)}
        self.has_analysis, self.has_weights = not analysis.isdisjoint(files), _WEIGHTS in files
        expected = {
            _TOKENS,
            *(analysis if self.has_analysis else ()),
            *([_WEIGHTS] if self.has_weights else ()),
        }
        wrong = sorted(expected.symmetric_difference(files))
        if wrong:
            raise UsageError(
                f"{files.path} must name the files of calibration statistics for {layers} layers",
                got=f"{wrong[0]!r:.80}, which is {'unknown' if wrong[0] in files else 'missing'}",
                fix=self._remedy,
            )
        return {name: files.string(name) for name in files}

    def _read_windows(self, dims: ModelDims) -> Tensor:
        windows = self._read(_TOKENS, ["tokens"])["tokens"]
        longest = dims.max_positions or _LARGEST_CAPACITY
        problem: str | None = None
        if windows.dtype != torch.int32 or windows.ndim != 2 or not windows.numel():
            problem = f"{windows.dtype} {list(windows.shape)}"
        elif not 2 <= windows.shape[1] <= longest:
            problem = f"windows of {windows.shape[1]} tokens"
        elif not 0 <= int(windows.min()) <= int(windows.max()) < dims.vocab_size:
            problem = f"token ids from {int(windows.min())} to {int(windows.max())}"
        if problem is not None:
            raise UsageError(
                f"{self._directory / _TOKENS} must have token windows of the model",
                got=problem,
                expected=f"int32 [N, 2 to {longest}], token ids from 0 to {dims.vocab_size - 1}",
                fix=self._remedy,
            )
        return windows.long()

    @property
    def tokens_sha256(self) -> str:
        """SHA-256 of the file of token windows."""
        return self._sha256[_TOKENS]

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
