"""The sensitivity analysis of a build, whose results serve every request for the same calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from kvexport.build.saved_stages import SavedStages
from kvexport.build.stage_cache import CacheWriter
from kvexport.build.stages import Stages
from kvexport.calibrate import Moments, Statistics, StatisticsWriter
from kvexport.convert import (
    CompressionRequest,
    LayerSensitivity,
    Method,
    analyze_sensitivity,
    methods_for,
)
from kvexport.convert.method_names import BEST
from kvexport.convert.request import group_sizes
from kvexport.model.decoder import Attention, Decoder
from kvexport.progress import Progress


class SensitivityAnalysis:
    """Reads the saved sensitivity of each layer, or analyses it and saves it."""

    def __init__(
        self, decoder: Decoder, capacity: int, saved: SavedStages, stages: Stages, progress: Progress
    ) -> None:
        """
        Args:
            decoder: the trained model, on the device that computes.
            capacity: tokens of a sequence, for which codes of rotated keys are made.
            saved: has the results of an earlier analysis, and saves new ones.
            stages: records the stage "analysis" as computed or reused.
            progress: shows the analysis and notes.
        """
        self._decoder, self._capacity, self._saved = decoder, capacity, saved
        self._stages, self._progress = stages, progress

    @property
    def is_saved(self) -> bool:
        """Whether `analyze` has nothing to compute."""
        saved = self._saved.with_sensitivities()
        return saved is not None and saved.capacity == self._capacity

    def for_methods(
        self, windows: Tensor, methods: Sequence[Method], sizes: Sequence[int], folder: Path | None
    ) -> list[LayerSensitivity]:
        """Sensitivity of each layer for some methods and at least these group sizes.

        Args:
            windows: calibration windows [N, length] int64.
            methods: methods that match heads.
            sizes: group sizes, ascending.
            folder: for temporary files; None: the system's temporary folder.
        """
        # a large --group-size is not among the sizes that are analysed for every request
        if not set(sizes) <= set(_analyzed_sizes(self._decoder.layers[0].attention)):
            with self._stages.timed("analysis"):
                return self._compute(windows, methods, sizes, folder, ())
        return [_of_methods(layer, methods) for layer in self.analyze(windows, folder)]

    def analyze(
        self, windows: Tensor, folder: Path | None, writer: StatisticsWriter | None = None
    ) -> list[LayerSensitivity]:
        """Sensitivity of each layer for all methods and group sizes, saved or analysed now.

        It does not depend on the requested size of the cache, so that one analysis serves every request.

        Args:
            windows: calibration windows [N, length] int64.
            folder: for temporary files; None: the system's temporary folder.
            writer: receives moments and sensitivities.
        """
        saved, count = self._saved.with_sensitivities(), len(self._decoder.layers)
        if saved is not None and saved.capacity == self._capacity:
            read = self._saved.read(lambda: _read(saved, count, writer))
            if read is not None:
                self._stages.reused.append("analysis")
                return read
        elif saved is not None:
            self._progress.note(
                f"the statistics are for a capacity of {saved.capacity} tokens: the sensitivities are "
                f"analysed again for {self._capacity}"
            )
        with self._stages.timed("analysis"), self._saved.analysis_writer(windows) as cache_writer:
            attention = self._decoder.layers[0].attention
            methods, sizes = methods_for(BEST, attention), _analyzed_sizes(attention)
            del attention  # its layer need not stay in memory
            writers = [each for each in (writer, cache_writer) if each is not None]
            layers = self._compute(windows, methods, sizes, folder, writers)
            for index, layer in enumerate(layers):
                for each in writers:
                    each.save_sensitivity(index, layer.tensors())
        return layers

    def _compute(
        self,
        windows: Tensor,
        methods: Sequence[Method],
        sizes: Sequence[int],
        folder: Path | None,
        writers: Sequence[StatisticsWriter | CacheWriter],
    ) -> list[LayerSensitivity]:
        """Analyse each layer; `writers` receive its moments."""

        def save_moments(index: int, moments: Moments) -> None:
            for writer in writers:
                writer.save_moments(index, moments)

        return analyze_sensitivity(
            self._decoder,
            windows,
            methods,
            sizes,
            moments_of=self._saved.moments_of(windows),
            save_moments=save_moments,
            capacity=self._capacity,
            progress=self._progress,
            folder=folder,
        )


def _read(saved: Statistics, count: int, writer: StatisticsWriter | None) -> list[LayerSensitivity]:
    """Saved sensitivities of `count` layers; `writer` receives a copy, and the moments."""
    layers = []
    for index in range(count):
        tensors = saved.sensitivity(index)
        layers.append(LayerSensitivity.from_tensors(tensors))
        if writer is not None:
            writer.save_moments(index, saved.moments(index))
            writer.save_sensitivity(index, tensors)
    return layers


def _analyzed_sizes(attention: Attention) -> list[int]:
    """Group sizes of a saved analysis, ascending: those of a request that names none."""
    return group_sizes(CompressionRequest(), attention)


def _of_methods(layer: LayerSensitivity, methods: Sequence[Method]) -> LayerSensitivity:
    """The sensitivity for some of its methods, in the order given."""
    return replace(layer, key_sensitivity={method: layer.key_sensitivity[method] for method in methods})
