"""What `kvexport analyze` finds out about a checkpoint, and the order in which it does.

Knows what each station hands to the next and the JSON of the whole; every station's own knowledge stays there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from kvexport.analyze.maps import CODING, AttentionMaps, MapRecorder, packed, parse_pairs
from kvexport.analyze.sample import shown_window, token_texts
from kvexport.analyze.spectra import ENERGIES, SHARES, LayerSpectra, SpectraStream, Spectrum
from kvexport.build.conversion_job import sequence_capacity, warn_about_little_text
from kvexport.build.options import BuildOptions
from kvexport.bundle.layer_report import LayerReport
from kvexport.calibrate import calibration_windows
from kvexport.convert import (
    ConvertedLayer,
    LayerPlan,
    LayerSensitivity,
    convert,
    methods_for,
    plan_compression,
    require_ratio,
)
from kvexport.model.checkpoint import Checkpoint
from kvexport.model.decoder import Decoder
from kvexport.model.divergence import Divergence
from kvexport.model.loader import load_decoder
from kvexport.progress import Progress
from kvexport.version import __version__

TOKENS = 48  # of the window whose maps are kept: they grow with its square


class Sensitivity(TypedDict):
    """How much the whole model answers to what one layer's keys and values lose."""

    layer: int
    key: float
    value: float


@dataclass(frozen=True)
class Facts:
    """The model that was analysed, and on what."""

    name: str
    model_type: str
    layers: int
    attention_heads: int
    kv_heads: int
    head_dim: int
    calibration: dict[str, Any]
    calibration_tokens: int


@dataclass(frozen=True)
class LayerAnalysis:
    """One layer: how its cache varies, and what its conversion was predicted and measured to cost."""

    spectra: LayerSpectra
    report: LayerReport

    @property
    def tightness(self) -> float | None:
        """Predicted error over measured error: 1 where the prediction is exact, more where it is cautious."""
        return (
            self.report.predicted_error / self.report.measured_error
            if self.report.measured_error > 0
            else None
        )


@dataclass(frozen=True)
class Analysis:
    """Everything that the page shows.

    Attributes:
        divergence: of the converted model, on held-out calibration windows.
        token_ids, tokens: the window of the attention maps, as ids and as text.
        pairs: query and key positions whose weights are listed.
        sensitivity: one record a layer, where it was measured.
    """

    facts: Facts
    layers: tuple[LayerAnalysis, ...]
    divergence: Divergence
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    maps: AttentionMaps
    pairs: tuple[tuple[int, int], ...]
    sensitivity: Sequence[Sensitivity] | None = None

    @property
    def kv_ratio(self) -> float:
        """Cached numbers per token after conversion over those before."""
        reports = [layer.report for layer in self.layers]
        return sum(each.kv_width for each in reports) / sum(each.original_kv_width for each in reports)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as `--json` prints them; the maps as `maps.CODING` says."""
        found = {
            "kvexport": __version__,
            "model": asdict(self.facts),
            "kv_ratio": self.kv_ratio,
            "divergence": self.divergence.to_json(),
            "layers": [_layer_json(index, layer) for index, layer in enumerate(self.layers)],
            "attention": self.attention_json(),
        }
        return found if self.sensitivity is None else found | {"sensitivity": list(self.sensitivity)}

    def attention_json(self) -> dict[str, Any]:
        """The window and its maps."""
        listed = []
        for query, key in self.pairs:
            original, compressed = self.maps.weights(query, key)
            listed.append({"query": query, "key": key, "original": original, "compressed": compressed})
        return {
            "token_ids": list(self.token_ids),
            "tokens": list(self.tokens),
            "coding": CODING,
            "original": [packed(each) for each in self.maps.original],
            "compressed": [packed(each) for each in self.maps.compressed],
            "distance": [[round(each, 5) for each in heads] for heads in self.maps.distance()],
            "pairs": listed,
        }


def _layer_json(index: int, layer: LayerAnalysis) -> dict[str, Any]:
    return {
        "layer": index,
        "spectra": {name: _spectrum_json(each) for name, each in layer.spectra.spectra.items()},
        "similarity": similarity_json(layer),
        "report": asdict(layer.report),
        "tightness": layer.tightness,
    }


def similarity_json(layer: LayerAnalysis) -> dict[str, list[list[float]]]:
    """The matrices of a layer, by name."""
    matrices = layer.spectra.similarity.items()
    return {name: [[round(each, 4) for each in row] for row in matrix.tolist()] for name, matrix in matrices}


def _spectrum_json(spectrum: Spectrum) -> dict[str, Any]:
    return {
        "singular_values": [float(f"{each:.6g}") for each in spectrum.values.tolist()],
        "energy": {f"{share:g}": spectrum.energy_in(share) for share in SHARES},
        "effective_rank": {f"{share:g}": spectrum.rank_for(share) for share in ENERGIES},
    }


def analyze(
    checkpoint: Path,
    plan: BuildOptions,
    progress: Progress,
    *,
    text: Path | None = None,
    tokens: int = TOKENS,
    pairs: str | None = None,
) -> Analysis:
    """Measure a checkpoint's cache, convert it, and compare the two models' attention. Nothing is written.

    Args:
        plan: the conversion that is looked at; its calibration text is that of its recipe.
        text: its first `tokens` tokens are the window of the attention maps; None: the model's own text.
        pairs: query and key positions in that window whose weights are listed, such as '12:3,20:4'.

    Raises:
        UsageError: the checkpoint, the recipe, the conversion or the pairs cannot be used.
        CannotRunHere: the model cannot sample its own text here.
    """
    source, recipe = Checkpoint(checkpoint), plan.recipe
    decoder = load_decoder(source)
    attention = decoder.layers[0].attention
    methods = methods_for(plan.method, attention)
    require_ratio(plan.request, methods, attention)  # before any work
    if pairs is not None:
        parse_pairs(pairs, tokens)  # before any work
    sampled = recipe.source == "self"
    with progress.stage("Sampling calibration text" if sampled else "Reading calibration text", 0):
        windows = calibration_windows(decoder, checkpoint, recipe, progress.advance)
        window = shown_window(decoder, checkpoint, text, tokens, recipe, windows, progress.advance)
    warn_about_little_text(windows, attention.k.weight.shape[0], progress)
    facts = Facts(
        name=checkpoint.resolve().name,
        model_type=str(source.config["model_type"]),
        layers=len(decoder.layers),
        attention_heads=attention.num_heads,
        kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        calibration=recipe.to_json(),
        calibration_tokens=windows.numel(),
    )
    ids = window.tolist()
    listed = [] if pairs is None else parse_pairs(pairs, len(ids))
    limit = sequence_capacity(decoder)
    choice = plan_compression(decoder, windows, plan.request, methods, None, limit, progress)
    conversion = convert(decoder, windows, choice.layer_plans, capacity=limit)
    layers, maps = compare(decoder, windows, conversion, window, progress)
    texts = token_texts(checkpoint, ids)
    surveyed = None
    if choice.layers:
        surveyed = [
            _relative_sensitivity(i, layer, choice.layer_plans[i]) for i, layer in enumerate(choice.layers)
        ]
    return Analysis(
        facts, tuple(layers), conversion.divergence(), tuple(ids), tuple(texts), maps, tuple(listed), surveyed
    )


def _relative_sensitivity(index: int, layer: LayerSensitivity, way: LayerPlan) -> Sensitivity:
    """KL per unit of relative error power of the attention output."""
    power = layer.output_power
    return {
        "layer": index,
        "key": power * layer.key_sensitivity[way.method],
        "value": power * layer.value_sensitivity,
    }


def compare(
    decoder: Decoder, windows: Tensor, converted: Iterable[ConvertedLayer], window: Tensor, progress: Progress
) -> tuple[list[LayerAnalysis], AttentionMaps]:
    """Pass over the layers, each measured on `windows` [N, S] and run over `window` [S] beside its converted twin."""
    stream, recorder, layers = SpectraStream(decoder, windows), MapRecorder(decoder, window), []
    with progress.stage("Analysing layers", len(decoder.layers)):
        for each in converted:
            layer = decoder.layers[each.index]
            layers.append(LayerAnalysis(stream.measure(layer), each.report))
            recorder.add(layer, each.layer)
            del layer, each  # before the next is read
            progress.advance()
    return layers, recorder.finish()
