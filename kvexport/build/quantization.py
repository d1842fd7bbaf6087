"""Quantisation of the weights that a build writes, and what it costs.

The cost is the divergence of the quantised model from the same model in float, after compression: it is
measured apart from what compression costs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvexport.build.options import BuildOptions
from kvexport.build.source_weights import SourceWeights, taken_map, taken_maps
from kvexport.bundle.formats import BLOCKS, INTEGERS, WeightFormats, resolve_formats
from kvexport.convert import CompressionPlan, LayerPlan, split_windows, trained_shape
from kvexport.convert.methods import folds, in_layer
from kvexport.convert.streams import Streams
from kvexport.model import reference
from kvexport.model.decoder import Attention, Decoder, Layer, Linear
from kvexport.model.divergence import Divergence, DivergenceMeter
from kvexport.model.placement import CPU, move, place
from kvexport.quantize.grid import Bits
from kvexport.quantize.inputs import PARTS, all_linears, linears_of, with_linears
from kvexport.quantize.layers import WeightSettings
from kvexport.quantize.model import LayerQuantizer
from kvexport.quantize.sensitivity import ATTENTION, HEAD, layer_key
from kvexport.quantize.stored import keep_codes
from kvexport.quantize.tables import quantize_tables

_BITS: dict[str, Bits] = {"int4": 4, "int8": 8}


def requested_formats(options: BuildOptions, decoder: Decoder) -> WeightFormats:
    """The formats that the options ask for.

    The block follows the codes of a quantised checkpoint, if it has any in a block of a bundle.
    """
    return resolve_formats(
        options.dtype,
        tied=decoder.head is None,
        hidden_size=decoder.dims.hidden_size,
        weights=options.weights,
        head_weights=options.head_weights,
        embedding_weights=options.embedding_weights,
        weight_block=options.weight_block or _stored_block(decoder),
    )


def _stored_block(decoder: Decoder) -> int | None:
    """The block of the codes of the first layer; None: it has none, or not in a block of a bundle."""
    codes = decoder.layers[0].mlp.up.codes
    if codes is None or codes.bits != 4:
        return None
    block = codes.codes.shape[1] // codes.scales.shape[1]
    return block if block in BLOCKS else None


def kept_weights(
    decoder: Decoder, plan: CompressionPlan, formats: WeightFormats, options: BuildOptions
) -> set[str]:
    """Keys of the weights that keep the codes of a quantised checkpoint. Reads all of its layers.

    Args:
        decoder: the trained model, with its codes.
        plan: how each layer is converted.
        formats: of the weights.
        options: of the build.
    """

    def keeps(linear: Linear, name: str) -> bool:
        dtype = getattr(torch, options.dtype)
        return keep_codes(linear, name, options.weight_block, dtype).codes is not None

    kept: set[str] = set()
    for index, layer in enumerate(decoder.layers):
        changed = _changed_maps(layer.attention, plan.layer_plans[index], heals=options.heal is not None)
        for name, each in all_linears(layer).items():
            if name not in changed and keeps(each, formats.layers):
                kept.add(layer_key(index, name))
    if decoder.head is not None and keeps(decoder.head, formats.head):
        kept.add(HEAD)
    return kept


def _changed_maps(attention: Attention, plan: LayerPlan, *, heals: bool) -> tuple[str, ...]:
    """Names of the linear maps whose weights conversion changes, beside the order of heads."""
    if plan.shape == trained_shape(attention):
        return ()
    return ATTENTION if heals or folds(in_layer(plan.method, attention), attention) else ("v", "o")


def weight_settings(options: BuildOptions, formats: WeightFormats) -> WeightSettings:
    """How the options ask to quantise weights."""
    return WeightSettings(
        bits=4 if formats.layers == "int4" else 8,
        block=formats.block,
        dtype=getattr(torch, options.dtype),
        method=options.weight_method,
    )


class WeightQuantization:
    """Quantises layers as they arrive from the conversion, in the streams of the model in float and of the
    quantised one.

    The codes of a layer are made for the inputs that the quantised layers before it give; all but "nearest"
    fit them on the calibration windows. Codes that a quantised checkpoint has already are kept, where they
    are in the requested form.

    Attributes:
        decoder: the model with its embedding and head quantised, on the CPU; its layers are the original's.
    """

    @torch.no_grad()
    def __init__(
        self,
        decoder: Decoder,
        formats: WeightFormats,
        windows: Tensor,
        settings: WeightSettings,
        *,
        head_inputs: Tensor | None = None,
        device: torch.device | None = None,
        stored_as: str | None = None,
        requested_block: int | None = None,
    ) -> None:
        """
        Args:
            decoder: the trained model, on the CPU; of a quantised checkpoint with the codes that it has.
            formats: of the weights.
            windows: calibration tokens [N, length] int64, of which the last eighth is held out.
            settings: how codes are chosen.
            head_inputs: second moments of the head's inputs, [width, width], for GPTQ; None: the head is
                rounded to nearest.
            device: device that computes [default: the CPU].
            stored_as: name of the format of a quantised checkpoint; None: its weights are floats.
            requested_block: the block that the user asks for; codes of a quantised checkpoint with another
                are not kept. None: they are kept, whatever their block.
        """
        self._original, self._formats, self._settings = decoder, formats, settings
        self._quantizer, self._index = LayerQuantizer(settings, formats.eight_bits), 0
        self._requested_block = requested_block
        self._stored_as, self._trained_width = stored_as, decoder.layers[0].attention.kv_width
        self._taken: list[dict[str, str]] = []
        self._taken_head: str | None = None
        self._device = device or torch.device(CPU)
        self._held_out = split_windows(len(windows))[1]
        if settings.method == "nearest":  # the others are not needed
            windows = windows[self._held_out]
            self._held_out = range(len(windows))
        self._windows = windows
        if decoder.head is not None:
            head = keep_codes(decoder.head, formats.head, self._requested_block, settings.dtype)
            decoder, self._taken_head = replace(decoder, head=head), taken_map(head)
        self.decoder = quantize_tables(
            decoder, _BITS.get(formats.head), _BITS.get(formats.embedding), settings, head_inputs
        )
        embedding = move(self.decoder.embedding, self._device)
        self._streams = Streams(place(decoder, self._device), windows, embedding)

    @torch.no_grad()
    def quantize(self, layer: Layer) -> Layer:
        """The next layer, on the CPU, with its linear maps in their format."""
        layer, streams = move(layer, self._device), self._streams
        streams.attend(layer)
        quantized = self._with_kept_codes(layer)
        if self._formats.layers in INTEGERS:
            if self._settings.method == "nearest":
                quantized = self._quantizer.without_inputs(self._index, quantized)
            else:
                quantized = self._quantizer(self._index, quantized, streams)
        self._index += 1
        streams.advance_both(layer, quantized)
        return move(quantized, CPU)

    @torch.no_grad()
    def divergence(self) -> Divergence:
        """The divergence of the quantised model from the model in float on held-out windows, after the last
        layer.
        """
        meter, (after, before, _) = DivergenceMeter(), self._streams.before_layer()
        for at in self._held_out:
            one = slice(at, at + 1)
            logits = (
                reference.logits(self._original, before[one].to(CPU)),
                reference.logits(self.decoder, after[one].to(CPU)),
            )
            meter.add(*logits, self._windows[one])
        return meter.finish()

    @property
    def source_weights(self) -> SourceWeights | None:
        """How the weights of a quantised checkpoint were taken, after the last layer; None: it has floats."""
        if self._stored_as is None:
            return None
        return SourceWeights(self._stored_as, tuple(self._taken), self._taken_head)

    def _with_kept_codes(self, layer: Layer) -> Layer:
        """The layer with the codes of the checkpoint where these are kept."""
        formats = self._formats
        for part in PARTS:
            kept = {
                name: keep_codes(each, formats.layers, self._requested_block, self._settings.dtype)
                for name, each in linears_of(layer, part).items()
            }
            layer = with_linears(layer, part, kept)
        if formats.layers in INTEGERS:
            compressed = layer.attention.kv_width != self._trained_width
            self._taken.append(taken_maps(layer, compressed=compressed))
        return layer
