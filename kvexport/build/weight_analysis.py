"""The weight analysis of a build, and the choice of the weights that get 8 bits in place of 4.

Losses are measured on the trained model, before compression. Names of linear maps survive compression, and
bytes are counted on the trained shapes: those of a compressed model are fewer.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from kvexport.build.options import BuildOptions
from kvexport.build.quantization import requested_formats, weight_settings
from kvexport.build.report import WeightBits
from kvexport.build.saved_stages import SavedStages
from kvexport.build.stages import Stages
from kvexport.bundle.formats import WeightFormats, require_mean_bits
from kvexport.model.decoder import Decoder
from kvexport.progress import Progress
from kvexport.quantize.inputs import all_linears
from kvexport.quantize.layers import WeightSettings
from kvexport.quantize.method_names import DEFAULT_BITS
from kvexport.quantize.mixed import MixedBits, MixedBitsFrontier
from kvexport.quantize.sensitivity import (
    EMBEDDING,
    HEAD,
    WeightAnalysis,
    WeightLoss,
    analyze_weights,
    names_by_layer,
    stored_bytes,
)

STAGE = "weight-analysis"


class WeightAnalysisStage:
    """Reads the saved losses of weights, or measures them and saves them; chooses formats by them."""

    def __init__(
        self, decoder: Decoder, options: BuildOptions, saved: SavedStages, stages: Stages, progress: Progress
    ) -> None:
        """
        Args:
            decoder: the trained model, on the device that computes.
            options: the options of the build.
            saved: has the results of an earlier analysis, and saves new ones.
            stages: records the stage as computed or reused.
            progress: shows the analysis.

        Raises:
            UsageError: the options allow fewer bits than the smallest formats have.
        """
        self._decoder, self._options, self._saved = decoder, options, saved
        self._stages, self._progress = stages, progress
        if self.is_needed and options.weight_bits is not None:  # before the work starts
            require_mean_bits(options.weight_bits, _least_bits(decoder, options, self._settings))

    @cached_property
    def _settings(self) -> WeightSettings:
        """How weights are quantised; finding the block reads a layer, which other builds do without."""
        return weight_settings(self._options, requested_formats(self._options, self._decoder))

    @property
    def is_needed(self) -> bool:
        """Whether the build chooses between 4 and 8 bits."""
        return self._options.mixes_bits

    @property
    def is_saved(self) -> bool:
        """Whether there is nothing to measure."""
        return self._saved.weight_analysis(self._settings) is not None

    def choose(
        self, windows: Tensor, folder: Path, kept: Collection[str] = ()
    ) -> tuple[WeightFormats, WeightBits | None, Tensor | None]:
        """Choose the weights that get 8 bits.

        Args:
            windows: calibration windows [N, length] int64.
            folder: for temporary files.
            kept: keys of weights that keep the codes of a quantised checkpoint, which leave no choice.

        Returns:
            The formats, what was chosen (None: there was no choice), and second moments of the head's inputs
            for its quantisation.

        Raises:
            UsageError: the options ask for fewer bits or less loss than is possible.
        """
        analysis = self._analyze(windows, folder)
        formats, bits = choose_bits(self._decoder, self._options, analysis.losses, kept)
        return formats, bits, analysis.head_inputs

    def _analyze(self, windows: Tensor, folder: Path) -> WeightAnalysis:
        saved = self._saved.weight_analysis(self._settings)
        if saved is not None:
            self._stages.reused.append(STAGE)
            return WeightAnalysis.from_tensors(saved)
        with self._stages.timed(STAGE):
            found = analyze_weights(
                self._decoder, windows, self._settings, progress=self._progress, folder=folder
            )
        self._saved.save_weight_analysis(self._settings, windows, found.tensors())
        return found


def choose_bits(
    decoder: Decoder, options: BuildOptions, losses: Mapping[str, WeightLoss], kept: Collection[str] = ()
) -> tuple[WeightFormats, WeightBits | None]:
    """Choose the weights that get 8 bits, of those whose formats the options leave open.

    Args:
        decoder: the trained model.
        options: the options of the build, which mix bits.
        losses: what every weight costs, by key, as `analyze_weights` returns them.
        kept: keys of weights that keep the codes of a quantised checkpoint.

    Returns:
        The formats, and what was chosen; None: there was no choice.

    Raises:
        UsageError: the options ask for fewer bits or less loss than is possible.
    """
    formats, fixed = requested_formats(options, decoder), _fixed_keys(decoder, options).union(kept)
    losses = {key: loss for key, loss in losses.items() if key not in fixed}
    if not losses:
        return formats, None
    count = sum(each.weights for each in losses.values())
    frontier = MixedBitsFrontier(losses)
    if options.weight_max_kl is not None:
        choice = frontier.within_kl(options.weight_max_kl)
    else:
        choice = _within_bits(frontier, options.weight_bits, count)
    keys = tuple(key for key in losses if key in choice.eight_bits)
    bits = WeightBits(keys, choice.kl, 8 * choice.bytes / count, choice.bytes)
    return _with_eight_bits(formats, keys, decoder), bits


def _within_bits(frontier: MixedBitsFrontier, bits: float | None, count: int) -> MixedBits:
    """The choice for `count` weights with a mean number of bits; None: the default."""
    least = 8 * frontier.fewest.bytes / count
    if bits is None:
        bits = max(DEFAULT_BITS, least)
    require_mean_bits(bits, least)
    return frontier.within_bytes(max(frontier.fewest.bytes, int(min(bits * count / 8, sys.maxsize))))


def _fixed_keys(decoder: Decoder, options: BuildOptions) -> set[str]:
    """Keys of tables whose formats the user has chosen; a tied one has both names."""
    given = {HEAD: options.head_weights, EMBEDDING: options.embedding_weights}
    fixed = {key for key, name in given.items() if name is not None}
    return {HEAD, EMBEDDING} if fixed and decoder.head is None else fixed


def _with_eight_bits(formats: WeightFormats, keys: Collection[str], decoder: Decoder) -> WeightFormats:
    if EMBEDDING in keys:
        formats = replace(formats, embedding="int8")
    if HEAD in keys or (EMBEDDING in keys and decoder.head is None):
        formats = replace(formats, head="int8")
    return replace(formats, eight_bits=tuple(map(tuple, names_by_layer(keys, len(decoder.layers)))))


def _least_bits(decoder: Decoder, options: BuildOptions, settings: WeightSettings) -> float:
    """Mean bits with 8 bits nowhere, as if all layers had the shapes of the first."""
    layer, fixed, tables = decoder.layers[0], _fixed_keys(decoder, options), []
    if EMBEDDING not in fixed:
        tables.append(decoder.embedding.weight)
    if HEAD not in fixed and decoder.head is not None:
        tables.append(decoder.head.weight)
    maps = [each.weight for each in all_linears(layer).values()]
    weights = [*(len(decoder.layers) * maps), *tables]
    size = sum(stored_bytes(each, settings.bits, settings) for each in weights)
    return 8 * size / sum(each.numel() for each in weights)
