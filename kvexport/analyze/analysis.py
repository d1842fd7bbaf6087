"""The pipeline of `kvexport analyze`, its results and their JSON form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from kvexport.analyze.maps import CODING, AttentionMaps, MapRecorder, packed, parse_pairs
from kvexport.analyze.sample import shown_window, token_texts
from kvexport.analyze.spectra import ENERGIES, SHARES, LayerSpectra, SpectraStream, Spectrum
from kvexport.build.conversion_job import ConversionJob
from kvexport.build.options import BuildOptions
from kvexport.bundle.layer_report import LayerReport
from kvexport.convert import (
    ConvertedLayer,
    LayerPlan,
    LayerSensitivity,
    convert,
)
from kvexport.model.decoder import Decoder
from kvexport.model.divergence import Divergence
from kvexport.model.placement import device_computation
from kvexport.progress import Progress
from kvexport.version import __version__

TOKENS = 48  # tokens of the window of the attention maps, whose size grows with the square


class Sensitivity(TypedDict):
    """Sensitivity of the model to the loss of one layer's keys and values; see `sections`."""

    layer: int
    key: float
    value: float


@dataclass(frozen=True)
class Facts:
    """The analysed model and its calibration."""

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
    """Spectra and similarity of one layer's cache, and the report of its conversion."""

    spectra: LayerSpectra
    report: LayerReport

    @property
    def tightness(self) -> float | None:
        """Predicted error / measured error; None if the measured error is 0."""
        return (
            self.report.predicted_error / self.report.measured_error
            if self.report.measured_error > 0
            else None
        )


@dataclass(frozen=True)
class Analysis:
    """All data of the page.

    Attributes:
        facts: the model and its calibration.
        layers: one entry per layer.
        divergence: divergence of the converted model, on held-out calibration windows.
        token_ids: window of the attention maps.
        tokens: text of each of its tokens.
        maps: attention maps of both models.
        pairs: query and key positions whose weights are listed.
        sensitivity: one record per layer; None if it was not measured.
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
        """Plain JSON values, as `--json` prints them; maps are coded as in `maps.CODING`."""
        values = {
            "kvexport": __version__,
            "model": asdict(self.facts),
            "kv_ratio": self.kv_ratio,
            "divergence": self.divergence.to_json(),
            "layers": [_layer_json(index, layer) for index, layer in enumerate(self.layers)],
            "attention": self.attention_json(),
        }
        return values if self.sensitivity is None else values | {"sensitivity": list(self.sensitivity)}

    def attention_json(self) -> dict[str, Any]:
        """Plain JSON values of the window and its maps."""
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
    """Similarity matrices of a layer by name, rounded to 4 digits."""
    matrices = layer.spectra.similarity.items()
    return {name: [[round(each, 4) for each in row] for row in matrix.tolist()] for name, matrix in matrices}


def _spectrum_json(spectrum: Spectrum) -> dict[str, Any]:
    return {
        "singular_values": [float(f"{each:.6g}") for each in spectrum.values.tolist()],
        "energy": {f"{share:g}": spectrum.energy_in(share) for share in SHARES},
        "effective_rank": {f"{share:g}": spectrum.rank_for(share) for share in ENERGIES},
    }


@device_computation()
def analyze(
    checkpoint: Path,
    plan: BuildOptions,
    progress: Progress,
    *,
    text: Path | None = None,
    tokens: int = TOKENS,
    pairs: str | None = None,
) -> Analysis:
    """Measure a checkpoint's cache, convert it in memory, and compare the attention of both models.

    Args:
        checkpoint: directory of the checkpoint.
        plan: the conversion, with its calibration recipe or statistics.
        progress: shows the stages.
        text: file whose first `tokens` tokens are the window of the attention maps; None: text sampled by the
            model.
        tokens: length of that window.
        pairs: query and key positions in that window whose weights are listed, such as '12:3,20:4'.

    Raises:
        UsageError: the checkpoint, the recipe, the conversion or the pairs are invalid.
        CannotRunHere: the model does not fit into memory to sample text, or PyTorch cannot use the device.
    """
    job = ConversionJob(checkpoint, None, plan, progress, all_text=True)
    job.check_ratio()
    if pairs is not None:
        parse_pairs(pairs, tokens)  # before any work
    job.plan_progress(("text", "analysis", "trials", "convert"))
    windows, decoder = job.calibrate(), job.placed
    with progress.stage("Reading the text to show", 0):
        window = shown_window(
            decoder, checkpoint, text, tokens, job.options.recipe, windows, progress.advance
        )
    attention = decoder.layers[0].attention
    facts = Facts(
        name=checkpoint.resolve().name,
        model_type=str(job.checkpoint.config["model_type"]),
        layers=len(decoder.layers),
        attention_heads=attention.num_heads,
        kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        calibration=job.calibration_record(),
        calibration_tokens=windows.numel(),
    )
    del attention  # its layer need not stay in memory
    ids = window.tolist()
    listed = [] if pairs is None else parse_pairs(pairs, len(ids))
    compression_plan = job.plan_compression(windows)
    moments_of = job.saved.moments_of(windows)
    conversion = convert(decoder, windows, compression_plan.layer_plans, moments_of, job.capacity)
    with job.stages.timed("convert"):
        layers, maps = compare(decoder, windows, conversion, window, progress)
    texts = token_texts(checkpoint, ids)
    job.saved.files.require_unchanged()
    sensitivity = None
    if compression_plan.layers:
        sensitivity = [
            _relative_sensitivity(i, layer, compression_plan.layer_plans[i])
            for i, layer in enumerate(compression_plan.layers)
        ]
    return Analysis(
        facts,
        tuple(layers),
        conversion.divergence(),
        tuple(ids),
        tuple(texts),
        maps,
        tuple(listed),
        sensitivity,
    )


def _relative_sensitivity(index: int, layer: LayerSensitivity, layer_plan: LayerPlan) -> Sensitivity:
    """Mean KL, nats per token, per unit of relative error power of the attention output."""
    power = layer.output_power
    return {
        "layer": index,
        "key": power * layer.key_sensitivity[layer_plan.method],
        "value": power * layer.value_sensitivity,
    }


def compare(
    decoder: Decoder, windows: Tensor, converted: Iterable[ConvertedLayer], window: Tensor, progress: Progress
) -> tuple[list[LayerAnalysis], AttentionMaps]:
    """Measure each layer on `windows` [N, S] int64, and run it and its converted version on `window` [S]
    int64.
    """
    stream, recorder, layers = SpectraStream(decoder, windows), MapRecorder(decoder, window), []
    with progress.stage("Analysing layers", len(decoder.layers)):
        for each in converted:
            layer = decoder.layers[each.index]
            layers.append(LayerAnalysis(stream.measure(layer), each.report))
            recorder.add(layer, each.layer)
            del layer, each  # before the next layer is loaded
            progress.advance()
    return layers, recorder.finish()
