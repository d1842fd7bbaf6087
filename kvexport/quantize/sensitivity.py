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

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from kvexport.calibrate import windows as attention_windows
from kvexport.convert.score_gradients import gradients_before_head
from kvexport.convert.sensitivity import trial_windows
from kvexport.convert.streams import split_windows
from kvexport.files.safetensors_io import save_tensors
from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer, Linear, Mlp, WeightCodes
from kvexport.model.divergence import DivergenceMeter
from kvexport.progress import Progress
from kvexport.quantize.grid import Bits
from kvexport.quantize.inputs import PARTS, LayerInputs, Products, linears_of, with_linears
from kvexport.quantize.layers import WeightSettings, quantize_part
from kvexport.quantize.model import quantize_embedding, quantize_head

HEAD, EMBEDDING = "head", "embedding"
ATTENTION = ("q", "k", "v", "o")


@dataclass(frozen=True)
class WeightLoss:
    """What one weight costs in the bits of the settings and in 8 bits.

    Attributes:
        kl: mean KL in nats per prediction in the bits of the settings.
        kl_eight: the same in 8 bits.
        bytes: bytes of codes and scales in the bits of the settings.
        bytes_eight: the same in 8 bits.
    """

    kl: float
    kl_eight: float
    bytes: int
    bytes_eight: int


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


def measure_weight_losses(
    decoder: Decoder,
    windows: Tensor,
    settings: WeightSettings,
    *,
    progress: Progress | None = None,
    folder: Path | None = None,
) -> dict[str, WeightLoss]:
    """Measure the loss of every weight in the bits of the settings and in 8 bits.

    Args:
        decoder: the model, not quantised.
        windows: calibration tokens [N, length] int64, at least 2 windows.
        settings: format and method; weights are not corrected.
        progress: shows the stage.
        folder: where residual streams are kept meanwhile [default: the system's temporary folder].

    Returns:
        Losses by key: `layer_key`s, "head" and "embedding"; a tied head is a part of "embedding".
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
        analysis.finish()
    return analysis.losses


class _Analysis:
    """Forward and backward pass.

    Attributes:
        losses: those measured so far, by key.
    """

    def __init__(self, decoder: Decoder, tokens: Tensor, settings: WeightSettings, folder: Path) -> None:
        self._decoder, self._tokens, self._settings, self._folder = decoder, tokens, settings, folder
        count = len(tokens)
        measured = max(1, count // 3)
        self._fitted, self._measured = range(count - measured), slice(count - measured, count)
        self._predictions = measured * (tokens.shape[1] - 1)
        with torch.no_grad():
            self._x = reference.embed(decoder.embedding, tokens)
        self._gradients = torch.empty(0)
        self.losses: dict[str, WeightLoss] = {}

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
        self._gradients = gradients_before_head(self._decoder, self._x[self._measured])
        head = self._decoder.output
        second = Products(head.weight.shape[1], head.weight.device)
        for at in self._fitted:
            inputs = _before_head(self._decoder, self._x[at : at + 1])
            second.add(inputs, inputs)
        moments = None if self._settings.method == "nearest" else second.mean()

        def quantized(bits: Bits) -> Linear:
            return quantize_head(head, bits, self._settings.block, self._settings.dtype, moments)

        self._keep(HEAD, [(self._head_kl(each), each.codes) for each in map(quantized, self._both_bits)])

    @property
    def _both_bits(self) -> tuple[Bits, Bits]:
        return self._settings.bits, 8

    def _head_kl(self, head: Linear) -> float:
        meter = DivergenceMeter()
        tokens = self._tokens[self._measured]
        for at, x in enumerate(self._x[self._measured]):
            exact, other = (reference.logits(each, x[None]) for each in (self._decoder, self._with(head)))
            meter.add(exact, other, tokens[at : at + 1])
        return meter.finish().mean_kl

    def _with(self, head: Linear) -> Decoder:
        return replace(self._decoder, head=head)

    def run_backward(self, index: int) -> None:
        from safetensors.torch import load_file

        layer = self._decoder.layers[index]
        file = self._folder / str(index)
        x = load_file(file)["x"].to(self._gradients.device)
        file.unlink()
        quantized = self._quantized(layer, x)
        powers = dict.fromkeys(quantized, 0.0)
        measured = x[self._measured]
        for batch in attention_windows.batches(range(len(measured)), x.shape[1]):
            before, outputs = _go_back(layer, measured[batch], self._gradients[batch])
            for key, other in quantized.items():
                powers[key] += _power(other, outputs, key[0] in ATTENTION)
            self._gradients[batch] = before  # not earlier: those of outputs can be views of what it replaces
        for name in dict.fromkeys(name for name, _ in quantized):
            found = []
            for eight in (False, True):
                codes = _linears(quantized[name, eight])[name].codes
                found.append((powers[name, eight] / (2 * self._predictions), codes))
            self._keep(layer_key(index, name), found)

    @torch.no_grad()
    def _quantized(self, layer: Layer, x: Tensor) -> dict[tuple[str, bool], Layer]:
        """The layer with one linear map quantised, by its name and whether it has 8 bits in place of those of
        the settings.
        """
        inputs = LayerInputs(x, self._fitted)
        found: dict[tuple[str, bool], Layer] = {}
        for part in PARTS:
            linears, moments = linears_of(layer, part), inputs.moments(layer, part)
            for eight in (False, True):
                quantized = quantize_part(linears, moments, self._settings, tuple(linears) if eight else ())
                for name, linear in quantized.items():
                    found[name, eight] = with_linears(layer, part, {name: linear})
        return found

    @torch.no_grad()
    def finish(self) -> None:
        """Measure the embedding, whose error is that of the first layer's input."""
        embedding, tokens = self._decoder.embedding, self._tokens[self._measured]
        trained = reference.embed(embedding, tokens)
        found = []
        for bits in self._both_bits:
            table = quantize_embedding(embedding, bits, self._settings.block, self._settings.dtype)
            error = reference.embed(table, tokens) - trained
            power = float((error * self._gradients).sum(-1).double().square().sum())
            found.append((power / (2 * self._predictions), table.codes))
        self._keep(EMBEDDING, found)
        if self._decoder.head is None:  # one table, which serves both
            head, table_loss = self.losses.pop(HEAD), self.losses[EMBEDDING]
            self.losses[EMBEDDING] = replace(
                table_loss, kl=table_loss.kl + head.kl, kl_eight=table_loss.kl_eight + head.kl_eight
            )

    def _keep(self, key: str, found: Sequence[tuple[float, WeightCodes | None]]) -> None:
        (kl, codes), (kl_eight, codes_eight) = found
        assert codes is not None and codes_eight is not None
        dtype = self._settings.dtype
        self.losses[key] = WeightLoss(
            kl, kl_eight, stored_bytes(codes, dtype), stored_bytes(codes_eight, dtype)
        )


def stored_bytes(codes: WeightCodes, dtype: torch.dtype) -> int:
    """Bytes of codes and scales in a graph that computes in `dtype`."""
    return codes.codes.numel() * codes.bits // 8 + codes.scales.numel() * dtype.itemsize


def _before_head(decoder: Decoder, x: Tensor) -> Tensor:
    """Inputs of the head, of a residual stream after the last layer."""
    x = reference.normed(decoder.final_norm, x)
    return x if decoder.output_projection is None else reference.linear(decoder.output_projection, x)


def _linears(layer: Layer) -> dict[str, Linear]:
    return {name: linear for part in PARTS for name, linear in linears_of(layer, part).items()}


@dataclass(frozen=True)
class _Outputs:
    """Inputs and outputs of attention and MLP, [B, S, hidden], and the gradients with respect to outputs."""

    inner: tuple[Tensor, Tensor]
    output: tuple[Tensor, Tensor]
    gradient: tuple[Tensor, Tensor]


def _go_back(layer: Layer, x: Tensor, gradients: Tensor) -> tuple[Tensor, _Outputs]:
    """Go back through one layer.

    Args:
        layer: the layer.
        x: the residual stream before it, [B, S, hidden].
        gradients: gradients of scores with respect to the stream after it, same shape.

    Returns:
        Gradients with respect to `x`, and those within the layer.
    """
    inner: list[Tensor] = []
    outputs: list[Tensor] = []

    def attend(normed: Tensor) -> Tensor:
        inner.append(normed)
        outputs.append(attention_windows.attend(layer.attention, normed))
        return outputs[-1]

    def feed(mlp: Mlp, normed: Tensor) -> Tensor:
        inner.append(normed)
        outputs.append(reference.mlp(mlp, normed))
        return outputs[-1]

    before = x.clone().requires_grad_()
    with torch.enable_grad():
        after = reference.run_block(layer, before, attend, feed).residual
    first, *rest = torch.autograd.grad(after, (before, *outputs), gradients)
    attention, mlp = range(2)
    return first, _Outputs(
        (inner[attention].detach(), inner[mlp].detach()),
        (outputs[attention].detach(), outputs[mlp].detach()),
        (rest[attention], rest[mlp]),
    )


@torch.no_grad()
def _power(layer: Layer, outputs: _Outputs, in_attention: bool) -> float:
    """Σ_t (gᵀ_t Δo_t)² of a layer of which one linear map is quantised."""
    at = 0 if in_attention else 1
    if in_attention:
        output = attention_windows.attend(layer.attention, outputs.inner[at])
    else:
        output = reference.mlp(layer.mlp, outputs.inner[at])
    products = ((output - outputs.output[at]) * outputs.gradient[at]).sum(-1)
    return float(products.double().square().sum())
