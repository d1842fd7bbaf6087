"""The stages that a build need not compute: those of given statistics, or of earlier builds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

from torch import Tensor

from kvexport.build.options import BuildOptions
from kvexport.build.source_files import SourceFiles
from kvexport.build.stage_cache import CacheWriter, StageCache, cache_key, weights_key
from kvexport.calibrate import Moments, Statistics, StatisticsSource
from kvexport.convert import measure_moments
from kvexport.errors import UsageError
from kvexport.files.cache_folder import CacheFolder
from kvexport.model.checkpoint import Checkpoint
from kvexport.model.decoder import Decoder
from kvexport.progress import Progress
from kvexport.quantize.layers import WeightSettings

T = TypeVar("T")


class SavedStages:
    """Finds the saved calibration text, moments and sensitivities, and saves new ones in the build cache.

    Statistics that the user gives (`--statistics`) take the place of the build cache, which is then neither
    read nor written. Without statistics and without a cache nothing is found and nothing is saved.

    Attributes:
        statistics: the saved stages; None: there are none. They have calibration text; moments and
            sensitivities may be missing.
        files: the files from which results are made.
    """

    def __init__(
        self,
        options: BuildOptions,
        checkpoint: Checkpoint,
        source: StatisticsSource,
        decoder: Decoder,
        progress: Progress,
    ) -> None:
        """
        Args:
            options: name the statistics and the folder of the build cache.
            checkpoint: the checkpoint to be converted.
            source: what statistics of this build are measured on.
            decoder: the trained model, on the device that computes.
            progress: shows notes.

        Raises:
            UsageError: the given statistics are damaged, or those of another checkpoint.
        """
        self._source, self._decoder, self._progress = source, decoder, progress
        self.files = SourceFiles(checkpoint, options.recipe)
        self._cache: StageCache | None = None
        self._key: str | None = None
        self.statistics: Statistics | None = None
        if options.statistics is not None:
            self.statistics = Statistics(options.statistics, source.checkpoint, decoder)
        elif options.cache is not None:
            try:
                key = cache_key(checkpoint, source, decoder.embedding.weight.device.type)
            except OSError:  # the stage that needs the file says which
                return
            self._key, self._folder = key, CacheFolder(options.cache)
            self._cache = self._entry(key)
            self.statistics = self._cache.find()

    def moments_of(self, windows: Tensor) -> Callable[[int], Moments] | None:
        """A function that returns the saved moments of a layer; None: there are none.

        Those of the build cache that can no longer be read are measured again.

        Args:
            windows: calibration windows [N, length] int64.
        """
        saved = self.statistics
        if saved is None or not saved.has_analysis:
            return None
        measured = _MeasuredMoments(self._decoder, windows)

        def moments(index: int) -> Moments:
            found = self.read(lambda: saved.moments(index))
            return measured(index) if found is None else found

        return moments

    def read(self, reading: Callable[[], T]) -> T | None:
        """What a function returns that reads saved stages; None, with a note: the entry of the build cache
        can no longer be read.

        Raises:
            UsageError: given statistics can no longer be read.
        """
        try:
            return reading()
        except UsageError as error:
            if self._cache is None:
                raise
            if self.statistics is not None:
                self._progress.note(f"an entry of the build cache is made again: {error.what}")
            self.statistics = None
            return None

    def with_sensitivities(self) -> Statistics | None:
        """The statistics, if they have sensitivities."""
        saved = self.statistics
        return saved if saved is not None and saved.has_analysis else None

    def save_tokens(self, windows: Tensor) -> None:
        """Save the calibration windows [N, length] int64, in case the build is interrupted."""
        if self._cache is not None:
            self._cache.save_tokens(windows)

    @contextmanager
    def analysis_writer(self, windows: Tensor) -> Iterator[CacheWriter | None]:
        """A context that saves the results of an analysis when it ends without an exception.

        Args:
            windows: calibration windows [N, length] int64.

        Yields:
            The writer of moments and sensitivities; None: there is no build cache.
        """
        if self._cache is None:
            yield None
            return
        with self._cache.writer(windows, len(self._decoder.layers)) as writer:
            yield writer
        self.statistics = self._cache.find()  # the conversion reads the moments

    def weight_analysis(self, settings: WeightSettings) -> dict[str, Tensor] | None:
        """The tensors of a saved analysis of weights; None: there is none."""
        cache = self._weights_cache(settings)
        found = None if cache is None else cache.find()
        return self.read(found.weights) if found is not None and found.has_weights else None

    def save_weight_analysis(
        self, settings: WeightSettings, windows: Tensor, tensors: Mapping[str, Tensor]
    ) -> None:
        """Save an analysis of weights in the build cache.

        Args:
            settings: what it was made with.
            windows: calibration windows [N, length] int64.
            tensors: its tensors.
        """
        cache = self._weights_cache(settings)
        if cache is not None:
            with cache.writer(windows) as writer:
                writer.save_weights(tensors)

    def _weights_cache(self, settings: WeightSettings) -> StageCache | None:
        if self._key is None:
            return None
        return self._entry(weights_key(self._key, settings))

    def _entry(self, key: str) -> StageCache:
        return StageCache(self._folder, key, self._source, self.files, self._decoder, self._progress)


class _MeasuredMoments:
    """Measures the moments of one layer after another; an earlier layer starts from the first one again."""

    def __init__(self, decoder: Decoder, windows: Tensor) -> None:
        self._decoder, self._windows = decoder, windows
        self._next = 0
        self._moments: Iterator[Moments] = iter(())

    def __call__(self, index: int) -> Moments:
        if not 0 < self._next <= index:
            self._next, self._moments = 0, measure_moments(self._decoder, self._windows)
        moments = next(islice(self._moments, index - self._next, None))
        self._next = index + 1
        return moments
