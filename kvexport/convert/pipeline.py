"""Conversion layer by layer: moments, head order, codes, application, refit, next layer.

    moments (trained stream) -> head_order -> layer_code -> apply_code -> refit W_O (converted stream) ->
    advance both

The trained model's residual stream gives moments and targets; the converted model's stream contains the
errors of the layers before, so that the refit can compensate them. One layer and the two streams are in
memory at a time.
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
from kvexport.convert.methods import LayerPlan, Method, head_order, in_layer, layer_code
from kvexport.convert.permute import permute_heads
from kvexport.convert.predict import predict_error
from kvexport.convert.streams import Streams, TrainedStream, split_windows
from kvexport.errors import KvexportError
from kvexport.files.malloc import return_freed
from kvexport.model import reference
from kvexport.model.decoder import Attention, Decoder, Layer, parameters_of, tensors_of
from kvexport.model.divergence import Divergence, DivergenceMeter
from kvexport.model.placement import CPU, move


@dataclass(frozen=True)
class ConvertedLayer:
    """A layer after conversion, its index in the decoder, and its report."""

    index: int
    layer: Layer
    report: LayerReport


class Conversion:
    """An iterator over converted layers, each converted when requested; made by `convert`."""

    def __init__(
        self,
        decoder: Decoder,
        windows: Tensor,
        layer_plans: Sequence[LayerPlan],
        moments_of: Callable[[int], Moments] | None,
        capacity: int | None,
    ) -> None:
        self._decoder, self._windows = decoder, windows
        self._layer_plans, self._moments_of = layer_plans, moments_of
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

    @torch.no_grad()  # on the generator it would keep each layer in memory until the next is done
    def _convert(self, index: int) -> ConvertedLayer:
        layer, layer_plan = self._decoder.layers[index], self._layer_plans[index]
        layer_plan = replace(layer_plan, method=in_layer(layer_plan.method, layer.attention))
        converted, report = convert_layer(
            layer, self._streams, self._code_moments(index, layer, layer_plan.method), layer_plan
        )
        _require_finite(f"the weights of layer {index} after conversion", converted)
        residual_error = self._streams.advance_both(layer, converted)
        return ConvertedLayer(index, converted, replace(report, residual_error=residual_error))

    def _code_moments(self, index: int, layer: Layer, method: Method) -> CodeMoments:
        """The moments of which the method makes codes; also runs the layer's attention."""
        if self._moments_of is None or not method.weighted:  # saved moments are weighted
            moments = self._streams.measure(layer, weighted=method.weighted)
        else:
            self._streams.attend(layer)
            moments = self._moments_of(index)
        _require_finite(f"the calibration moments of layer {index}", moments)
        return make_code_moments(method.before_rotation, moments, move(layer.attention, CPU), self._positions)

    @torch.no_grad()
    def divergence(self) -> Divergence:
        """Divergence of the converted from the trained model on the held-out windows, after all layers are
        converted.
        """
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
    """Convert the decoder's layers one after another; each is yielded as soon as it is converted.

    Args:
        decoder: the trained model.
        windows: calibration tokens [N, length] int64; the last eighth is held out from moments and fits.
        layer_plans: one plan per layer; a layer whose shape is the trained one is left unchanged.
        moments_of: returns the saved moments of a layer; None: moments are measured on `windows`.
        capacity: tokens of a sequence; codes of rotated keys are made for all of these positions [default:
            length].

    Raises (while iterating):
        KvexportError: moments or weights are not finite.
    """
    return Conversion(decoder, windows, layer_plans, moments_of, capacity)


def measure_moments(decoder: Decoder, windows: Tensor) -> Iterator[Moments]:
    """Measure the moments of each layer of the trained model, without conversion (`kvexport calibrate`).

    Args:
        decoder: the trained model.
        windows: calibration tokens [N, length] int64; the last eighth is held out, as in `convert`.

    Raises:
        KvexportError: moments are not finite.
    """
    train, _ = split_windows(len(windows))
    stream = TrainedStream(decoder, windows[: len(train)], hold_out=False)
    for index in range(len(decoder.layers)):
        yield _measure_layer(index, decoder.layers[index], stream)


@torch.no_grad()
def _measure_layer(index: int, layer: Layer, stream: TrainedStream) -> Moments:
    moments = stream.measure(layer)
    _require_finite(f"the calibration moments of layer {index}", moments)
    stream.advance(layer)
    return moments


def unconverted_layers(decoder: Decoder) -> Iterator[ConvertedLayer]:
    """The decoder's own layers, for an export without compression."""
    for index in range(len(decoder.layers)):
        yield _unconverted(index, decoder.layers[index])


def _unconverted(index: int, layer: Layer) -> ConvertedLayer:
    return ConvertedLayer(index, layer, _unconverted_report(layer.attention))


def _unconverted_report(attention: Attention) -> LayerReport:
    parameters = parameters_of(attention)
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


def convert_layer(
    layer: Layer, streams: Streams, code_moments: CodeMoments, layer_plan: LayerPlan
) -> tuple[Layer, LayerReport]:
    """Convert one layer by its plan; codes are made on the CPU.

    Args:
        layer: the trained layer.
        streams: both residual streams before the layer; its trained attention has run.
        code_moments: moments on the side of RoPE on which the method codes keys.
        layer_plan: method and shape.

    Returns:
        The converted layer, and its report without `residual_error`.
    """
    trained, method, shape = move(layer.attention, CPU), layer_plan.method, layer_plan.shape
    if shape == trained_shape(trained):
        return layer, _unconverted_report(trained)
    order = head_order(method, code_moments, trained, shape)
    attention, code_moments = permute_heads(trained, order), code_moments.permute_heads(order)
    grouping = Grouping.of(attention, shape.kv_heads)
    code = layer_code(method, code_moments, attention, grouping, shape)
    predicted = predict_error(code_moments, attention, grouping, code)
    value_mean = code_moments.moments.value_mean
    coded = apply_code(attention, grouping, code, value_mean)
    converted = replace(layer, attention=move(coded, layer.attention.q.weight.device))
    measured = streams.attention_error(converted)
    parameters = parameters_of(converted.attention)
    del code_moments, code, coded  # of a wide layer, as large as what the refit needs
    return_freed()
    if method.refit:
        o = streams.refit(converted, fit_bias=method.centred)
        converted = replace(converted, attention=replace(converted.attention, o=o))
    return converted, replace(
        _unconverted_report(trained),
        method=method.name,
        num_key_value_heads=shape.kv_heads,
        key_head_dim=shape.key_dim,
        value_head_dim=shape.value_dim,
        predicted_error=predicted,
        measured_error=measured,
        parameters=parameters,
    )


def _require_finite(what: str, part: Moments | Layer) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors_of(part)):
        raise KvexportError(
            f"{what} must be finite",
            got="NaN or infinite numbers",
            fix="calibrate on other text (--calibration FILE); if that fails, the model overflows float32",
        )
