"""The one flow of conversion: layer by layer, measure, code, apply, refit, pass on.

Two residual streams run side by side over the calibration windows: the trained model's, which moments are taken
from, and the converted model's, which shows each layer what the layers before it have lost. Knows the order of
things; the mathematics is elsewhere. One layer is in memory at a time, and the two streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvexport.bundle.layer_report import LayerReport
from kvexport.calibrate import Moments
from kvexport.convert.apply import apply_code
from kvexport.convert.code_moments import CodeMoments, make_code_moments
from kvexport.convert.groups import Grouping, trained_shape
from kvexport.convert.methods import LayerPlan, head_order, layer_code
from kvexport.convert.permute import permute_heads
from kvexport.convert.predict import predict_error
from kvexport.convert.streams import Streams, TrainedStream
from kvexport.errors import KvexportError
from kvexport.model import reference
from kvexport.model.decoder import Attention, Decoder, Layer, tensors_of
from kvexport.model.divergence import Divergence, DivergenceMeter


@dataclass(frozen=True)
class ConvertedLayer:
    index: int
    layer: Layer
    report: LayerReport


class Conversion:
    """An iterator over converted layers, each made when asked for; afterwards, what all of it cost."""

    def __init__(
        self,
        decoder: Decoder,
        windows: Tensor,
        layer_plans: Sequence[LayerPlan],
        moments_of: Callable[[int], Moments] | None,
        capacity: int | None,
    ) -> None:
        self._decoder, self._windows, self._layer_plans, self._moments_of = (
            decoder,
            windows,
            layer_plans,
            moments_of,
        )
        self._positions = windows.shape[1] if capacity is None else capacity
        self._streams = Streams(decoder, windows)
        self._layers = self._run()

    def __iter__(self) -> Iterator[ConvertedLayer]:
        return self._layers

    def __next__(self) -> ConvertedLayer:
        return next(self._layers)

    def _run(self) -> Iterator[ConvertedLayer]:
        for index in range(len(self._decoder.layers)):
            yield self._convert(index)

    @torch.no_grad()  # not around the generator: there it would keep each layer until the next is done
    def _convert(self, index: int) -> ConvertedLayer:
        layer = self._decoder.layers[index]
        if self._moments_of is None:
            moments = self._streams.measure(layer)
        else:
            self._streams.attend(layer)
            moments = self._moments_of(index)
        _require_finite(f"the calibration moments of layer {index}", moments)
        layer_plan = self._layer_plans[index]
        code_moments = make_code_moments(
            layer_plan.method.before_rotation,
            moments,
            self._decoder.rope,
            self._positions,
            layer.attention.window,
        )
        converted, report = _convert_layer(layer, self._streams, code_moments, layer_plan)
        _require_finite(f"layer {index} after conversion", converted)
        residual_error = self._streams.advance_both(layer, converted)
        return ConvertedLayer(index, converted, replace(report, residual_error=residual_error))

    @torch.no_grad()
    def divergence(self) -> Divergence:
        """How far the converted model is from the trained one on the held-out windows; all layers must be done."""
        meter = DivergenceMeter()
        for trained, converted, windows in self._streams.held_out_pairs(self._windows):
            meter.add(
                reference.logits(self._decoder, trained), reference.logits(self._decoder, converted), windows
            )
        return meter.finish()


def convert(
    decoder: Decoder,
    windows: Tensor,
    layer_plans: Sequence[LayerPlan],
    moments_of: Callable[[int], Moments] | None = None,
    capacity: int | None = None,
) -> Conversion:
    """Convert the decoder's layers one after another, each yielded as soon as it is done.

    Args:
        decoder: the trained model.
        windows: calibration tokens [N, length] int64; the last eighth is held out from moments and fits.
        ways: how each layer is converted; one into its trained shape is left as it is.
        moments_of: where saved moments come from (else they are measured).
        capacity: tokens that a sequence may hold: codes of rotated keys are made for all of its positions [that many as
            a window has].
    """
    return Conversion(decoder, windows, layer_plans, moments_of, capacity)


def measure_moments(decoder: Decoder, windows: Tensor) -> Iterator[Moments]:
    """The moments of each layer of the trained model, without converting any (`kvexport calibrate`)."""
    stream = TrainedStream(decoder, windows)
    for index in range(len(decoder.layers)):
        yield _measure_layer(index, decoder.layers[index], stream)


@torch.no_grad()
def _measure_layer(index: int, layer: Layer, stream: TrainedStream) -> Moments:
    moments = stream.measure(layer)
    _require_finite(f"the calibration moments of layer {index}", moments)
    stream.advance(layer)
    return moments


def unconverted_layers(decoder: Decoder) -> Iterator[ConvertedLayer]:
    """The decoder's own layers, for what is exported as it was trained."""
    for index in range(len(decoder.layers)):
        yield _left_as_it_is(index, decoder.layers[index])


def _left_as_it_is(index: int, layer: Layer) -> ConvertedLayer:
    return ConvertedLayer(index, layer, _kept(layer.attention))


def _kept(attention: Attention) -> LayerReport:
    """The report of a layer that is left as it is."""
    parameters = sum(tensor.numel() for tensor in tensors_of(attention))
    return LayerReport(
        method="none",
        num_attention_heads=attention.num_heads,
        original_num_key_value_heads=attention.num_kv_heads,
        original_head_dim=attention.head_dim,
        num_key_value_heads=attention.num_kv_heads,
        key_head_dim=attention.head_dim,
        value_head_dim=attention.value_dim,
        predicted_error=0.0,
        measured_error=0.0,
        residual_error=0.0,
        parameters=parameters,
        original_parameters=parameters,
        window=attention.window,
    )


def _convert_layer(
    layer: Layer, streams: Streams, code_moments: CodeMoments, layer_plan: LayerPlan
) -> tuple[Layer, LayerReport]:
    trained, method, shape = layer.attention, layer_plan.method, layer_plan.shape
    if shape == trained_shape(trained):
        return layer, _kept(trained)
    order = head_order(method, code_moments, trained, shape)
    attention, code_moments = permute_heads(trained, order), code_moments.permute_heads(order)
    grouping = Grouping.of(attention, shape.kv_heads)
    code = layer_code(method, code_moments, attention, grouping, shape)
    predicted = predict_error(code_moments, attention, grouping, code)
    converted = replace(
        layer, attention=apply_code(attention, grouping, code, code_moments.moments.value_mean)
    )
    measured = streams.attention_error(converted)
    if method.refit:
        converted = replace(layer, attention=replace(converted.attention, o=streams.refit(converted)))
    return converted, replace(
        _kept(trained),
        method=method.name,
        num_key_value_heads=shape.kv_heads,
        key_head_dim=shape.key_dim,
        value_head_dim=shape.value_dim,
        predicted_error=predicted,
        measured_error=measured,
        parameters=sum(tensor.numel() for tensor in tensors_of(converted.attention)),
    )


def _require_finite(what: str, part: Moments | Layer) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors_of(part)):
        raise KvexportError(
            f"{what}: not all numbers are finite",
            fix="calibrate on other text (--calibration FILE); if it persists, the model itself overflows float32",
        )
