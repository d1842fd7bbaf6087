"""Finished stages of earlier builds: calibration text, moments and sensitivities, in the build cache.

An entry is a statistics directory; the analysis of weights, which has settings of its own, is an entry of its
own. The key of an entry is a hash of all that its numbers depend on. The cache is never the reason that a
build fails: whatever cannot be read is made again, and what cannot be written is left out, with a note.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kvexport.build.source_files import SourceFiles
from kvexport.bundle import formats
from kvexport.calibrate import Moments, Recipe, Statistics, StatisticsSource, StatisticsWriter
from kvexport.calibrate.statistics import FORMAT
from kvexport.errors import UsageError, reason_of
from kvexport.files.cache_folder import CacheFolder, Lease, NewDirectory
from kvexport.files.hashing import sha256_of
from kvexport.files.resources import resource
from kvexport.model.checkpoint import Checkpoint
from kvexport.model.decoder import Decoder
from kvexport.progress import Progress

# What determines the numbers: code of these packages and of the analysis, and files of these data folders.
_PACKAGES = ("calibrate", "convert", "model")
_DATA = (("calibration",), ("graphs", "families"))


def cache_key(checkpoint: Checkpoint, source: StatisticsSource, device: str) -> str:
    """The name of a cache entry: a hash of all that its numbers depend on.

    Args:
        checkpoint: its tokenizer and its generation settings count too.
        source: checkpoint, recipe and capacity; a calibration file counts by its content.
        device: type of the torch device that computes.
    """
    parts = {
        "format": FORMAT,
        "code": _code(),
        "torch": torch.__version__,
        "device": device,
        "checkpoint": source.checkpoint,
        "text files": [[path.name, sha256_of(path)] for path in checkpoint.text_files()],
        "recipe": _content(source.recipe),
        "capacity": source.capacity,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def weights_key(key: str, settings: object) -> str:
    """The name of the entry of an analysis of weights.

    Args:
        key: made by `cache_key`.
        settings: of the quantisation, whose `repr` has all of them.
    """
    code = _code_of(("quantize",), [Path(formats.__file__)])  # which decides what is stored in 8 bits anyway
    return hashlib.sha256(json.dumps([key, code, repr(settings)]).encode()).hexdigest()


def _content(recipe: Recipe) -> dict[str, object]:
    """The recipe, its files by content and suffix, which tells how they are read."""
    files = {
        field.name: [value.suffix, sha256_of(value)]
        for field in fields(recipe)
        if isinstance(value := getattr(recipe, field.name), Path)
    }
    return recipe.to_json() | files


@cache
def _code() -> str:
    """Hash of the code and data that determine the numbers: an entry of another version is never used."""
    paths = [Path(__file__).with_name("analysis.py")]
    paths += [path for parts in _DATA for path in sorted(resource(*parts).iterdir()) if path.is_file()]
    return _code_of(_PACKAGES, paths)


def _code_of(packages: Sequence[str], others: Sequence[Path] = ()) -> str:
    """Hash of the code of packages, and of other files."""
    paths = [path for name in packages for path in sorted(resource(name).rglob("*.py"))]
    paths += others
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


class StageCache:
    """The cache entry of one build."""

    def __init__(
        self,
        folder: CacheFolder,
        key: str,
        source: StatisticsSource,
        files: SourceFiles,
        decoder: Decoder,
        progress: Progress,
    ) -> None:
        """
        Args:
            folder: the build cache.
            key: made by `cache_key`.
            source: what the entry is measured on.
            files: must be unchanged when the entry is kept.
            decoder: the trained model.
            progress: shows notes.
        """
        self._folder, self._key, self._source, self._progress = folder, key, source, progress
        self._decoder, self.files = decoder, files
        self._lease: Lease | None = None
        self._reported = False

    def find(self) -> Statistics | None:
        """The stages that are finished, or None. The entry is not removed while this object lives."""
        self.release()
        self._lease = self._folder.lease(self._key)
        if self._lease is None:
            return None
        try:
            statistics = Statistics(self._lease.path, self._source.checkpoint, self._decoder)
        except UsageError as error:
            self.release()
            self._folder.remove(self._key)
            self._progress.note(f"a damaged entry of the build cache is made again: {error.what}")
            return None
        if not (statistics.has_analysis or statistics.has_weights):  # the text, which is all, has been read
            self.release()
        return statistics

    def release(self) -> None:
        """Allow the entry to be replaced and removed."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def save_tokens(self, windows: Tensor) -> None:
        """Keep the calibration windows [N, length] int64, in case the build is interrupted."""
        with self.writer(windows):
            pass

    def writer(self, windows: Tensor, layers: int = 0) -> CacheWriter:
        """A context that keeps the entry when it ends without an exception.

        Args:
            windows: calibration windows [N, length] int64.
            layers: number of layers that will be written.
        """
        return CacheWriter(self, windows, layers)

    def create(self) -> tuple[NewDirectory, StatisticsWriter]:
        """A new directory for the entry, and the writer of its files.

        Raises:
            OSError: the cache cannot be written.
        """
        directory = self._folder.create(self._key)
        return directory, StatisticsWriter(directory.path, self._source)

    def fits(self, count: int) -> bool:
        """Make room for an entry of `count` bytes; False, with a note, if it is too large."""
        if self._folder.make_room(count, self._key):
            return True
        self._progress.note(
            f"the statistics of this model, {count / 1e9:.1f} GB, do not fit into the build cache, whose "
            f"limit is {self._folder.limit() / 1e9:.1f} GB: a second build will analyse the model again"
        )
        return False

    def report(self, error: OSError) -> None:
        """Note once that the build continues without the cache."""
        if not self._reported:
            self._progress.note(
                f"the build cache {self._folder.path} cannot be written ({reason_of(error)}): the build "
                "continues without it"
            )
        self._reported = True


class CacheWriter:
    """Writes the files of an entry; after a failure it writes nothing more, and the entry is dropped.

    Raises (on exit):
        UsageError: the files from which it was made have changed.
    """

    def __init__(self, stages: StageCache, windows: Tensor, layers: int) -> None:
        self._stages, self._windows, self._layers = stages, windows, layers
        self._directory: NewDirectory | None = None
        self._writer: StatisticsWriter | None = None

    def __enter__(self) -> CacheWriter:
        with self._tolerant():
            self._directory, self._writer = self._stages.create()
            self._writer.save_tokens(self._windows)
        return self

    def save_moments(self, index: int, moments: Moments) -> None:
        """Keep the moments of one layer. The first layer's size predicts that of the entry."""
        with self._tolerant():
            if self._writer is not None and self._directory is not None:
                self._writer.save_moments(index, moments)
                if index == 0 and not self._stages.fits(self._directory.bytes() * self._layers):
                    self._drop()

    def save_sensitivity(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of one layer's sensitivity."""
        with self._tolerant():
            if self._writer is not None:
                self._writer.save_sensitivity(index, tensors)

    def save_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of the analysis of weights, if they fit."""
        with self._tolerant():
            if self._writer is not None and self._directory is not None:
                self._writer.save_weights(tensors)
                if not self._stages.fits(self._directory.bytes()):
                    self._drop()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._stages.files.require_unchanged()
                with self._tolerant():
                    if self._writer is not None and self._directory is not None:
                        self._writer.finish()
                        self._stages.release()  # this entry replaces it
                        self._directory.publish()
        finally:
            self._drop()

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._drop()
            self._stages.report(error)

    def _drop(self) -> None:
        if self._directory is not None:
            self._directory.close()
        self._directory = self._writer = None
