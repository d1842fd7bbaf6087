"""The one flow of conversion: layer by layer, measure, code, apply, refit, pass on.

Two residual streams run side by side over the calibration windows: the trained model's, which moments are taken
from, and the converted model's, which shows each layer what the layers before it have lost. Knows the order of
things; the mathematics is elsewhere. One layer is in memory at a time, and the two streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvexport import reference
from kvexport.calibrate import Moments, MomentsAccumulator
from kvexport.convert.apply import LayerCode, apply_code
from kvexport.convert.groups import Grouping
from kvexport.convert.methods import Method, candidates, folds, least_loss
from kvexport.convert.predict import predicted_error
from kvexport.convert.refit import LeastSquares, refit
from kvexport.decoder import Attention, Decoder, Layer, Rope, tensors_of
from kvexport.divergence import Divergence, DivergenceMeter
from kvexport.errors import KvexportError
from kvexport.layer_report import LayerReport

_SCORES = 1 << 22  # numbers of attention scores in one batch


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
        kv_heads: int,
        method: str,
        moments_of: Callable[[int], Moments] | None = None,
    ) -> None:
        self._decoder, self._windows, self._kv_heads, self._method = decoder, windows, kv_heads, method
        self._moments_of = moments_of
        self._streams = _Streams(decoder, windows)
        self._layers = self._run()

    def __iter__(self) -> Iterator[ConvertedLayer]:
        return self._layers

    def __next__(self) -> ConvertedLayer:
        return next(self._layers)

    @torch.no_grad()
    def _run(self) -> Iterator[ConvertedLayer]:
        for index, layer in enumerate(self._decoder.layers):
            moments = self._streams.measure(layer, None if self._moments_of is None else self._moments_of(index))
            converted, report = _convert_layer(layer, self._streams, moments, self._kv_heads, self._method)
            _require_finite(index, converted)
            residual_error = self._streams.advance(layer, converted)
            yield ConvertedLayer(index, converted, replace(report, residual_error=residual_error))
            del layer, converted

    @torch.no_grad()
    def divergence(self) -> Divergence:
        """How far the converted model is from the trained one on the held-out windows; all layers must be done."""
        meter = DivergenceMeter()
        for trained, converted, windows in self._streams.held_out_pairs(self._windows):
            meter.add(reference.logits(self._decoder, trained), reference.logits(self._decoder, converted), windows)
        return meter.finish()


def convert(
    decoder: Decoder,
    windows: Tensor,
    kv_heads: int,
    method: str,
    moments_of: Callable[[int], Moments] | None = None,
) -> Conversion:
    """Convert the decoder's layers one after another, each yielded as soon as it is done.

    Args:
        decoder: the trained model.
        windows: calibration tokens [N, length] int64; the last eighth is held out from moments and fits.
        kv_heads: KV heads to keep; must divide the trained number. If it is that number, nothing is converted.
        method: a name of `METHOD_NAMES`.
        moments_of: where saved moments come from (else they are measured).
    """
    return Conversion(decoder, windows, kv_heads, method, moments_of)


@torch.no_grad()
def measure(decoder: Decoder, windows: Tensor) -> Iterator[Moments]:
    """The moments of each layer of the trained model, without converting any (`kvexport calibrate`)."""
    streams = _Streams(decoder, windows)
    for layer in decoder.layers:
        yield streams.measure(layer, None)
        streams.advance(layer, layer)


def unconverted(decoder: Decoder) -> Iterator[ConvertedLayer]:
    """The decoder's own layers, for what is exported as it was trained."""
    for index, layer in enumerate(decoder.layers):
        yield ConvertedLayer(index, layer, _kept(layer.attention))


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
    )


def _convert_layer(layer: Layer, streams: _Streams, moments: Moments, kv_heads: int, method: str) -> tuple[Layer, LayerReport]:
    attention = layer.attention
    if kv_heads == attention.num_kv_heads:
        return layer, _kept(attention)
    grouping = Grouping(kv_heads, attention.num_kv_heads // kv_heads, attention.queries_per_kv_head, attention.head_dim)
    coded = [_code(each, moments, attention, grouping) for each in candidates(method, attention)]
    predictions = [predicted_error(moments, attention, grouping, code) for _, code in coded]
    best = least_loss(predictions)
    chosen, code = coded[best]
    converted = apply_code(attention, grouping, code, moments.value_mean)
    measured = streams.attention_error(layer, converted)
    if chosen.refit:
        converted = streams.refit(layer, converted)
    return replace(layer, attention=converted), replace(
        _kept(attention),
        method=chosen.name,
        num_key_value_heads=converted.num_kv_heads,
        key_head_dim=converted.key_dim,
        value_head_dim=converted.value_dim,
        predicted_error=predictions[best],
        measured_error=measured,
        parameters=sum(tensor.numel() for tensor in tensors_of(converted)),
    )


def _code(method: Method, moments: Moments, attention: Attention, grouping: Grouping) -> tuple[Method, LayerCode]:
    groups = range(grouping.kv_heads)
    return method, LayerCode(
        method.name,
        keys=tuple(method.key(moments, attention, grouping, group) for group in groups),
        values=tuple(method.value(moments, attention, grouping, group) for group in groups),
        folds=folds(method, attention),
        centred=method.centred,
    )


def _require_finite(index: int, layer: Layer) -> None:
    attention = layer.attention
    if not all(bool(each.weight.isfinite().all()) for each in (attention.q, attention.k, attention.v, attention.o)):
        raise KvexportError(
            f"converting layer {index} gave weights that are not finite",
            fix="calibrate on other text (--calibration FILE), or with more samples; if it persists, report it",
        )


class _Streams:
    """The trained and the converted residual stream over all windows, [N, S, hidden] each."""

    def __init__(self, decoder: Decoder, windows: Tensor) -> None:
        self._rope: Rope | None = decoder.rope
        self._trained = reference.embed(decoder.embedding, windows)
        self._converted = self._trained.clone()
        count, length = windows.shape
        self._fitted = count - max(1, count // 8) if count > 1 else count  # windows before this one make moments and fits
        self._positions = torch.arange(length)
        self._attended = torch.empty_like(self._trained)  # the trained attention's output, this layer

    def _batches(self, heads: int, start: int = 0, stop: int | None = None) -> Iterator[slice]:
        count, length = self._trained.shape[:2]
        size = max(1, _SCORES // (heads * length * length))
        stop = count if stop is None else stop
        return (slice(at, min(at + size, stop)) for at in range(start, stop, size))

    def _held_out(self) -> int:
        return self._fitted if self._fitted < len(self._trained) else 0

    def measure(self, layer: Layer, saved: Moments | None) -> Moments:
        """The layer's moments on the trained stream (or those saved), keeping its attention outputs."""
        accumulator = MomentsAccumulator(layer.attention)
        heads = layer.attention.num_heads
        if saved is None:
            for batch in self._batches(heads, 0, self._fitted):
                x = reference.norm(layer.attention_norm, self._trained[batch])
                self._attended[batch] = accumulator.add(x, self._rope)
        for batch in self._batches(heads, 0 if saved is not None else self._fitted):
            self._attended[batch] = self._attend(layer, layer.attention, self._trained[batch])
        return accumulator.finish() if saved is None else saved

    def _heads(self, layer: Layer, attention: Attention, x: Tensor) -> Tensor:
        positions = self._positions.expand(len(x), -1)
        return reference.head_outputs(attention, reference.norm(layer.attention_norm, x), positions, self._rope)[0]

    def _attend(self, layer: Layer, attention: Attention, x: Tensor) -> Tensor:
        return reference.linear(attention.o, self._heads(layer, attention, x))

    def attention_error(self, layer: Layer, converted: Attention) -> float:
        """Relative error of the converted attention's output on held-out trained inputs, about the mean output."""
        error = torch.zeros((), dtype=torch.float64)
        for batch in self._batches(converted.num_heads, self._held_out()):
            difference = self._attend(layer, converted, self._trained[batch]) - self._attended[batch]
            error += difference.double().square().sum()
        wanted = self._attended[self._held_out() :].double()
        power = (wanted - wanted.mean((0, 1))).square().sum()
        return float((error / power.clamp_min(torch.finfo(torch.float64).tiny)).sqrt())

    def refit(self, layer: Layer, converted: Attention) -> Attention:
        """W_O fitted so that the converted stream after attention comes close to the trained one."""
        into, out = converted.o.weight.shape[1], converted.o.weight.shape[0]
        seen, held_out = LeastSquares(into, out), LeastSquares(into, out)
        for sums, start, stop in ((seen, 0, self._fitted), (held_out, self._held_out(), None)):
            for batch in self._batches(converted.num_heads, start, stop):
                wanted = self._trained[batch] + self._attended[batch] - self._converted[batch]
                sums.add(self._heads(layer, converted, self._converted[batch]), wanted)
        return replace(converted, o=refit(converted.o, seen, held_out))

    def advance(self, layer: Layer, converted: Layer) -> float:
        """Both streams through the layer; returns the relative error of the converted one on held-out windows."""
        for batch in self._batches(layer.attention.num_heads):
            self._trained[batch] += self._attended[batch]
            self._trained[batch] += reference.mlp(layer.mlp, reference.norm(layer.mlp_norm, self._trained[batch]))
            x = self._converted[batch]
            x += self._attend(converted, converted.attention, x)
            x += reference.mlp(converted.mlp, reference.norm(converted.mlp_norm, x))
        wanted = self._trained[self._held_out() :].double()
        error = (self._converted[self._held_out() :] - wanted).square().sum()
        return float((error / wanted.square().sum().clamp_min(torch.finfo(torch.float64).tiny)).sqrt())

    def held_out_pairs(self, windows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Trained stream, converted stream [1, S, hidden] and token ids [1, S], one held-out window after another."""
        for at in range(self._held_out(), len(windows)):
            one = slice(at, at + 1)
            yield self._trained[one], self._converted[one], windows[one]
