"""The residual streams that conversion runs beside each other over the calibration windows.

The trained model's stream is what moments are taken from; the converted model's shows each layer what the layers
before it have lost. Knows how windows pass through a layer, and which of them are held out from moments and
fits; must not know how a layer is converted.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvexport.calibrate import Moments, MomentsAccumulator
from kvexport.calibrate import windows as attention_windows
from kvexport.convert.refit import LeastSquares, refit
from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer, Linear

_TINY = torch.finfo(torch.float64).tiny


def split_windows(count: int) -> tuple[range, range]:
    """Which of `count` windows are seen and which held out: the last eighth, at least one; of a single window, that one."""
    fitted = count - max(1, count // 8) if count > 1 else count
    return range(fitted), range(fitted if count > 1 else 0, count)


class TrainedStream:
    """The trained model's residual stream [N, S, hidden], and its attention's output in the present layer.

    Attributes:
        seen: the windows that moments and fits are made of.
        held_out: the last eighth, at least one, that judges them; of a single window, that one.
    """

    @torch.no_grad()
    def __init__(self, decoder: Decoder, windows: Tensor) -> None:
        self._rope = decoder.rope
        self._trained = reference.embed(decoder.embedding, windows)
        self._attended = torch.empty_like(self._trained)
        self.train, self.held_out = split_windows(len(windows))

    def measure(self, layer: Layer) -> Moments:
        """Pass the layer's attention, taking its moments over the windows seen."""
        accumulator = MomentsAccumulator(layer.attention)
        self.attend(layer, accumulator)
        return accumulator.finish()

    def attend(self, layer: Layer, accumulator: MomentsAccumulator | None = None) -> None:
        """Pass the layer's attention: its outputs are kept, and `accumulator` is shown the windows seen."""
        for batch in self._all(layer):
            if accumulator is not None and batch.start in self.train:
                normed = reference.norm(layer.attention_norm, self._trained[batch])
                self._attended[batch] = accumulator.add(normed, self._rope)
            else:
                self._attended[batch] = self._output(layer, self._trained[batch])

    def advance(self, layer: Layer) -> None:
        """Take the stream past the layer, whose attention it has passed."""
        for batch in self._all(layer):
            x = self._trained[batch]
            x += self._attended[batch]
            x += reference.mlp(layer.mlp, reference.norm(layer.mlp_norm, x))

    def _all(self, layer: Layer) -> Iterator[slice]:
        """Batches of every window, none of both kinds."""
        yield from self._batches(layer, self.train)
        if self.held_out.start == self.train.stop:
            yield from self._batches(layer, self.held_out)

    def _batches(self, layer: Layer, windows: range) -> Iterator[slice]:
        return attention_windows.batches(windows, self._trained.shape[1], layer.attention.num_heads)

    def _heads(self, layer: Layer, x: Tensor) -> Tensor:
        """Concatenated head outputs [B, S, Hq·width] of a residual stream [B, S, hidden]."""
        attention = layer.attention
        projected = attention_windows.project(attention, reference.norm(layer.attention_norm, x), self._rope)
        return attention_windows.head_outputs(attention, projected)

    def _output(self, layer: Layer, x: Tensor) -> Tensor:
        return reference.linear(layer.attention.o, self._heads(layer, x))


class Streams(TrainedStream):
    """The trained stream, and the converted one that began as its copy."""

    def __init__(self, decoder: Decoder, windows: Tensor) -> None:
        super().__init__(decoder, windows)
        self._converted = self._trained.clone()

    def attention_error(self, converted: Layer) -> float:
        """Relative error of the converted attention's output on held-out trained inputs, about the mean output."""
        error = torch.zeros((), dtype=torch.float64)
        for batch in self._batches(converted, self.held_out):
            difference = self._output(converted, self._trained[batch]) - self._attended[batch]
            error += difference.double().square().sum()
        wanted = self._attended[self.held_out.start :].double()
        power = (wanted - wanted.mean((0, 1))).square().sum()
        return float((error / power.clamp_min(_TINY)).sqrt())

    def refit(self, converted: Layer) -> Linear:
        """W_O fitted so that the converted stream after attention comes close to the trained one."""
        out, into = converted.attention.o.weight.shape
        train, held_out = LeastSquares(into, out), LeastSquares(into, out)
        for sums, windows in ((train, self.train), (held_out, self.held_out)):
            for batch in self._batches(converted, windows):
                wanted = self._trained[batch] + self._attended[batch] - self._converted[batch]
                sums.add(self._heads(converted, self._converted[batch]), wanted)
        return refit(converted.attention.o, train, held_out)

    def advance_both(self, layer: Layer, converted: Layer) -> float:
        """Both streams past the layer; returns the relative error of the converted one on held-out windows."""
        self.advance(layer)
        for batch in self._all(converted):
            x = self._converted[batch]
            x += self._output(converted, x)
            x += reference.mlp(converted.mlp, reference.norm(converted.mlp_norm, x))
        wanted = self._trained[self.held_out.start :].double()
        error = (self._converted[self.held_out.start :] - wanted).square().sum()
        return float((error / wanted.square().sum().clamp_min(_TINY)).sqrt())

    def held_out_pairs(self, windows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Trained stream, converted stream [1, S, hidden] and token ids [1, S], one held-out window after another."""
        for at in self.held_out:
            one = slice(at, at + 1)
            yield self._trained[one], self._converted[one], windows[one]
