"""The stages that a build need not compute: those of given statistics, or of earlier builds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from kvexport.build.options import BuildOptions
from kvexport.build.stage_cache import CacheWriter, StageCache, cache_key, weights_key
from kvexport.calibrate import Moments, Statistics, StatisticsSource
from kvexport.files.cache_folder import CacheFolder
from kvexport.model.checkpoint import Checkpoint
from kvexport.progress import Progress
from kvexport.quantize.layers import WeightSettings


class SavedStages:
    """Finds the saved calibration text, moments and sensitivities, and saves new ones in the build cache.

    Statistics that the user gives (`--statistics`) take the place of the build cache, which is then neither
    read nor written. Without statistics and without a cache nothing is found and nothing is saved.

    Attributes:
        statistics: the saved stages; None: there are none. They have calibration text; moments and
            sensitivities may be missing.
    """

    def __init__(
        self,
        options: BuildOptions,
        checkpoint: Checkpoint,
        source: StatisticsSource,
        layers: int,
        device: str,
        progress: Progress,
    ) -> None:
        """
        Args:
            options: name the statistics and the folder of the build cache.
            checkpoint: the checkpoint to be converted.
            source: what statistics of this build are measured on.
            layers: number of layers of the model.
            device: type of the torch device that computes.
            progress: shows notes.

        Raises:
            UsageError: the given statistics are damaged, or those of another checkpoint.
        """
        self._layers, self._source, self._progress = layers, source, progress
        self._cache: StageCache | None = None
        self._key: str | None = None
        self.statistics: Statistics | None = None
        if options.statistics is not None:
            self.statistics = Statistics(options.statistics, source.checkpoint)
        elif options.cache is not None:
            try:
                key = cache_key(checkpoint, source, device)
            except OSError:  # the stage that needs the file says which
                return
            self._key, self._folder = key, CacheFolder(options.cache)
            self._cache = StageCache(self._folder, key, source, progress)
            self.statistics = self._cache.find()

    def moments_of(self) -> Callable[[int], Moments] | None:
        """A function that reads the saved moments of a layer; None: there are none."""
        saved = self.statistics
        return saved.moments if saved is not None and saved.has_moments(self._layers) else None

    def with_sensitivities(self) -> Statistics | None:
        """The statistics, if they have the sensitivity of every layer."""
        saved = self.statistics
        return saved if saved is not None and saved.has_sensitivity(self._layers) else None

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
        with self._cache.writer(windows, self._layers) as writer:
            yield writer
        self.statistics = self._cache.find()  # the conversion reads the moments

    def weight_analysis(self, settings: WeightSettings) -> dict[str, Tensor] | None:
        """The tensors of a saved analysis of weights; None: there is none."""
        cache = self._weights_cache(settings)
        found = None if cache is None else cache.find()
        return found.weights() if found is not None and found.has_weights else None

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
        return StageCache(self._folder, weights_key(self._key, settings), self._source, self._progress)
