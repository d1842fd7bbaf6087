"""Sensitivity of the model to fewer bits: the KL that each linear map causes in 4 and in 8 bits.

A weight in codes changes the output of its attention or MLP at position t by Δo_t. With the gradients g_t of
scores with respect to that output (`kvexport.convert.score_gradients`), and errors of different positions
uncorrelated, it causes

    KL = ½ E[Σ_t (gᵀ_t Δo_t)²].

Codes are what the method makes of the weight on moments of the trained model. Moments are from other windows
than the KL, which would be too small on windows that GPTQ has fitted. Losses of several weights add up. The
KL of the head is measured directly.

One layer is in memory at a time; the residual streams of the windows are on disk.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.nn import functional as F

from kvexport.bundle.formats import weight_format
from kvexport.calibrate import windows as attention_windows
from kvexport.convert.score_gradients import LayerOutputs, ScoreGradients
from kvexport.convert.sensitivity import trial_windows
from kvexport.convert.streams import split_windows
from kvexport.files.safetensors_io import save_tensors
from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer
from kvexport.model.divergence import DivergenceMeter
from kvexport.progress import Progress
from kvexport.quantize.grid import Bits, dequantize, grid_for
from kvexport.quantize.inputs import PARTS, LayerInputs, Products, all_linears, linears_of, with_linears
from kvexport.quantize.layers import PartQuantizer, WeightSettings
from kvexport.quantize.tables import quantize_head, table_codes

HEAD, EMBEDDING = "head", "embedding"
_HEAD_INPUTS = "head inputs"
ATTENTION = ("q", "k", "v", "o")


@dataclass(frozen=True)
class WeightLoss:
    """What one weight costs in the bits of the settings and in 8 bits.

    Attributes:
        weights: how many numbers it has.
        kl: mean KL in nats per prediction in the bits of the settings.
        kl_eight: the same in 8 bits.
        bytes: bytes of codes and scales in the bits of the settings.
        bytes_eight: the same in 8 bits.
    """

    weights: int
    kl: float
    kl_eight: float
    bytes: int
    bytes_eight: int


@dataclass(frozen=True)
class WeightAnalysis:
    """What `analyze_weights` finds.

    Attributes:
        losses: of every weight, by key: `layer_key`s, "head" and "embedding"; a tied head is a part of
            "embedding".
        head_inputs: second moments of the head's inputs in the trained model, [width, width]; None: the
            method takes none.
    """

    losses: dict[str, WeightLoss]
    head_inputs: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """As tensors to be saved."""
        found = {
            key: torch.tensor([float(value) for value in vars(loss).values()], dtype=torch.float64)
            for key, loss in self.losses.items()
        }
        return found if self.head_inputs is None else found | {_HEAD_INPUTS: self.head_inputs.cpu()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> WeightAnalysis:
        """The inverse of `tensors`."""
        losses = {}
        for key, each in tensors.items():
            if key != _HEAD_INPUTS:
                weights, kl, kl_eight, size, size_eight = each.tolist()
                losses[key] = WeightLoss(int(weights), kl, kl_eight, int(size), int(size_eight))
        return cls(losses, tensors.get(_HEAD_INPUTS))


def layer_key(index: int, name: str) -> str:
    """The key of a linear map, such as "3.down"."""
    return f"{index}.{name}"


def names_by_layer(keys: Collection[str], count: int) -> list[list[str]]:
    """The names of linear maps among `keys`, for each of `count` layers."""
    names = [list[str]() for _ in range(count)]
    for key in keys:
        index, _, name = key.partition(".")
        if name:
            names[int(index)].append(name)
    return names


def analyze_weights(
    decoder: Decoder,
    windows: Tensor,
    settings: WeightSettings,
    *,
    progress: Progress | None = None,
    folder: Path | None = None,
) -> WeightAnalysis:
    """Measure the loss of every weight in the bits of the settings and in 8 bits.

    Args:
        decoder: the model, not quantised.
        windows: calibration tokens [N, length] int64.
        settings: format and method; weights are not corrected.
        progress: shows the stage.
        folder: where residual streams are kept meanwhile [default: the system's temporary folder].
    """
    progress, count = progress or Progress(), len(decoder.layers)
    train, _ = split_windows(len(windows))
    tokens = windows[trial_windows(len(train))]
    with (
        TemporaryDirectory(dir=folder, prefix="streams.") as streams,
        progress.stage("Analyzing weight sensitivity", 2 * count),
    ):
        analysis = _Analysis(decoder, tokens, replace(settings, ridge=None), Path(streams))
        for index in range(count):
            analysis.run_forward(index)
            progress.advance()
        analysis.start_backward()
        for index in reversed(range(count)):
            analysis.run_backward(index)
            progress.advance()
        return analysis.finish()


class _Analysis:
    """Forward and backward pass."""

    def __init__(self, decoder: Decoder, tokens: Tensor, settings: WeightSettings, folder: Path) -> None:
        self._decoder, self._tokens, self._settings, self._folder = decoder, tokens, settings, folder
        count = len(tokens)
        measured = max(1, count // 3)
        self._fitted, self._measured = range(max(1, count - measured)), slice(count - measured, count)
        self._predictions = measured * (tokens.shape[1] - 1)
        with torch.no_grad():
            self._x = reference.embed(decoder.embedding, tokens)
        self._losses: dict[str, WeightLoss] = {}

    @torch.no_grad()
    def run_forward(self, index: int) -> None:
        layer = self._decoder.layers[index]
        save_tensors({"x": self._x.cpu()}, self._folder / str(index))
        attend = partial(attention_windows.attend, layer.attention)
        for batch in attention_windows.batches(range(len(self._x)), self._x.shape[1]):
            self._x[batch] = reference.run_block(layer, self._x[batch], attend).residual

    @torch.no_grad()
    def start_backward(self) -> None:
        """Measure the head, and take the gradients before it."""
        self._gradients = ScoreGradients(self._decoder, self._x[self._measured])
        self._fitted_inputs, self._head_inputs = self._moments_before_head()
        self._head_kl = [self._kl_of_head(bits) for bits in self._both_bits]

    @property
    def _both_bits(self) -> tuple[Bits, Bits]:
        return self._settings.bits, 8

    def _moments_before_head(self) -> tuple[Tensor | None, Tensor | None]:
        """Second moments of the head's inputs over the windows that codes are fitted on, and over all."""
        if not self._settings.carries_errors:
            return None, None
        width, device = self._decoder.output.weight.shape[1], self._x.device
        fitted, every = Products(width, device), Products(width, device)
        for at in range(len(self._x)):
            inputs = reference.head_inputs(self._decoder, self._x[at : at + 1])
            for each in (fitted, every) if at in self._fitted else (every,):
                each.add(inputs, inputs)
        return fitted.mean(), every.mean()

    def _kl_of_head(self, bits: Bits) -> float:
        head = quantize_head(self._decoder.output, bits, self._settings, self._fitted_inputs)
        meter, other = DivergenceMeter(), replace(self._decoder, head=head)
        for tokens, x in zip(self._tokens[self._measured], self._x[self._measured], strict=True):
            exact, rounded = (reference.logits(each, x[None]) for each in (self._decoder, other))
            meter.add(exact, rounded, tokens[None])
        return meter.finish().mean_kl

    def run_backward(self, index: int) -> None:
        from safetensors.torch import load_file

        layer = self._decoder.layers[index]
        file = self._folder / str(index)
        x = load_file(file)["x"].to(self._x.device)
        file.unlink()
        quantized = self._quantized(layer, x)
        powers = dict.fromkeys(quantized, 0.0)
        for _, outputs in self._gradients.batches(layer, x[self._measured]):
            for key, other in quantized.items():
                powers[key] += _power(other, outputs, key[0] in ATTENTION)
        for name in dict.fromkeys(name for name, _ in quantized):
            self._keep(
                layer_key(index, name),
                all_linears(layer)[name].weight,
                [powers[name, eight] / (2 * self._predictions) for eight in (False, True)],
            )

    @torch.no_grad()
    def _quantized(self, layer: Layer, x: Tensor) -> dict[tuple[str, bool], Layer]:
        """The layer with one linear map quantised, by its name and whether it has 8 bits in place of those of
        the settings.
        """
        inputs = LayerInputs(x, self._fitted)
        found: dict[tuple[str, bool], Layer] = {}
        for part in PARTS:
            linears = linears_of(layer, part)
            quantizer = PartQuantizer(inputs.moments(layer, part), self._settings)
            for eight in (False, True):
                for name, linear in quantizer(linears, tuple(linears) if eight else ()).items():
                    found[name, eight] = with_linears(layer, part, {name: linear})
        return found

    @torch.no_grad()
    def finish(self) -> WeightAnalysis:
        """Measure the embedding, whose error is that of the first layer's input."""
        decoder, kl = self._decoder, [self._kl_of_embedding(bits) for bits in self._both_bits]
        if decoder.head is None:  # one table, which serves both
            kl = [sum(each) for each in zip(kl, self._head_kl, strict=True)]
        else:
            self._keep(HEAD, decoder.head.weight, self._head_kl)
        self._keep(EMBEDDING, decoder.embedding.weight, kl)
        return WeightAnalysis(self._losses, self._head_inputs)

    def _kl_of_embedding(self, bits: Bits) -> float:
        table, settings = self._decoder.embedding, self._settings
        used, rows = self._tokens[self._measured].unique(return_inverse=True)
        # rows are quantised independently
        weight = F.embedding(used.to(table.weight.device), table.weight)
        second = self._fitted_inputs if self._decoder.head is None else None
        codes = table_codes(weight, grid_for(table.weight, bits, settings.block), settings, second)
        exact, rounded = (
            reference.embed(replace(table, weight=each), rows)
            for each in (weight, dequantize(codes).to(weight.dtype))
        )
        products = ((rounded - exact) * self._gradients.before).sum(-1)
        return float(products.double().square().sum()) / (2 * self._predictions)

    def _keep(self, key: str, weight: Tensor, kl: Sequence[float]) -> None:
        sizes = [stored_bytes(weight, bits, self._settings) for bits in self._both_bits]
        self._losses[key] = WeightLoss(weight.numel(), kl[0], kl[1], sizes[0], sizes[1])


def stored_bytes(weight: Tensor, bits: Bits, settings: WeightSettings) -> int:
    """Bytes of the codes and scales of a weight [out, in] in a graph that computes in the settings' dtype."""
    rows, columns = weight.shape
    found = weight_format("int4" if bits == 4 else "int8", rows, columns, settings.block)
    dtype = str(settings.dtype).removeprefix("torch.")
    return found.stored_bytes(rows, columns, dtype)


@torch.no_grad()
def _power(layer: Layer, found: LayerOutputs, in_attention: bool) -> float:
    """Σ_t (gᵀ_t Δo_t)² of a layer of which one linear map is quantised."""
    at = 0 if in_attention else 1
    if in_attention:
        output = attention_windows.attend(layer.attention, found.inputs[at])
    else:
        output = reference.mlp(layer.mlp, found.inputs[at])
    products = ((output - found.outputs[at]) * found.gradients[at]).sum(-1)
    return float(products.double().square().sum())
