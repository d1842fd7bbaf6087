"""Residual streams of the trained and the converted model over the calibration windows, one layer at a time.

The trained stream gives the moments and the targets. The converted stream gives each layer the input that it
will have after all layers before it were converted. Both are [N, S, hidden] in the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from kvexport.calibrate import Moments, MomentsAccumulator
from kvexport.calibrate import windows as attention_windows
from kvexport.convert.refit import LeastSquares, refit
from kvexport.model import reference
from kvexport.model.decoder import Decoder, Embedding, Layer, Linear

_TINY = torch.finfo(torch.float64).tiny


def split_windows(count: int) -> tuple[range, range]:
    """Split `count` windows into training windows and held-out windows.

    The last eighth is held out, at least one window. A single window is both.
    """
    fitted = count - max(1, count // 8) if count > 1 else count
    return range(fitted), range(fitted if count > 1 else 0, count)


class TrainedStream:
    """The trained model's residual stream [N, S, hidden], and its attention's output in the current layer.

    Attributes:
        train: windows from which moments and fits are made.
        held_out: windows on which errors are measured.
    """

    @torch.no_grad()
    def __init__(self, decoder: Decoder, windows: Tensor, *, hold_out: bool = True) -> None:
        """
        Args:
            decoder: the trained model.
            windows: token ids [N, S] int64.
            hold_out: whether windows are held out, as `split_windows` splits them.
        """
        self._trained = reference.embed(decoder.embedding, windows)
        self._attended = torch.empty_like(self._trained)
        count = len(windows)
        self.train, self.held_out = split_windows(count) if hold_out else (range(count), range(count, count))

    def measure(self, layer: Layer, *, weighted: bool = True) -> Moments:
        """Run the layer's attention on all windows; returns the moments over the training windows.

        Args:
            weighted: whether tokens are weighted, as `MomentsAccumulator` does.
        """
        accumulator = MomentsAccumulator(layer.attention, weighted=weighted)
        self.attend(layer, accumulator)
        return accumulator.finish()

    def attend(self, layer: Layer, accumulator: MomentsAccumulator | None = None) -> None:
        """Run the layer's attention on all windows and keep its output; `accumulator` gets the training
        windows.
        """
        for batch in self._all():
            if accumulator is not None and batch.start in self.train:
                inner = reference.normed(layer.attention_norm, self._trained[batch])
                self._attended[batch] = accumulator.add(inner)
            else:
                self._attended[batch] = self._output(layer, self._trained[batch])

    def of_windows(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """The stream before the layer, and the layer's attention output, of some windows.

        Args:
            which: indices of the windows, [M] int64.

        Returns:
            Two tensors [M, S, hidden].
        """
        which = which.to(self._trained.device)
        return self._trained[which], self._attended[which]

    def advance(self, layer: Layer) -> None:
        """Advance the stream past the layer; `measure` or `attend` must have run its attention."""
        for batch in self._all():
            self._trained[batch] = reference.run_block(
                layer, self._trained[batch], _given(self._attended[batch])
            ).residual

    def _all(self) -> Iterator[slice]:
        """Batches of all windows; none contains both training and held-out windows."""
        yield from self._batches(self.train)
        if self.held_out.start == self.train.stop:
            yield from self._batches(self.held_out)

    def _batches(self, windows: range) -> Iterator[slice]:
        return attention_windows.batches(windows, self._trained.shape[1])

    def _heads(self, layer: Layer, x: Tensor) -> Tensor:
        """Concatenated head outputs [B, S, H·width] of a residual stream [B, S, hidden]."""
        inner = reference.normed(layer.attention_norm, x)
        return attention_windows.head_outputs(
            layer.attention, attention_windows.project(layer.attention, inner)
        )

    def _output(self, layer: Layer, x: Tensor) -> Tensor:
        return reference.linear(layer.attention.o, self._heads(layer, x))


def _given(attended: Tensor) -> Callable[[Tensor], Tensor]:
    """Attention whose output is already known."""
    return lambda _: attended


class Streams(TrainedStream):
    """The trained stream, and the converted stream, which starts as a copy of it."""

    def __init__(self, decoder: Decoder, windows: Tensor, embedding: Embedding | None = None) -> None:
        """
        Args:
            decoder: the trained model.
            windows: token ids [N, S] int64.
            embedding: that of the converted model; None: the trained one.
        """
        super().__init__(decoder, windows)
        self._converted = self._trained.clone()
        if embedding is not None:
            self._converted = reference.embed(embedding, windows)
        # head outputs [N, S, H·width] on the converted stream that a refit has left for `advance_both`
        self._converted_heads: Tensor | None = None

    def before_layer(self) -> tuple[Tensor, Tensor, Tensor]:
        """The converted and the trained stream before the current layer, and the output of its trained
        attention, which must have run; [N, S, hidden] each.
        """
        return self._converted, self._trained, self._attended

    def attention_error(self, converted: Layer) -> float:
        """Relative error of the converted attention's output on held-out windows of the trained stream.

        The root of the error's power over the power of the trained output about its mean.
        """
        error = torch.zeros((), dtype=torch.float64, device=self._trained.device)
        for batch in self._batches(self.held_out):
            difference = self._output(converted, self._trained[batch]) - self._attended[batch]
            error += difference.double().square().sum()
        target = self._attended[self.held_out.start :].double()
        power = (target - target.mean((0, 1))).square().sum()
        return float((error / power.clamp_min(_TINY)).sqrt())

    def refit(self, converted: Layer, *, fit_bias: bool = True) -> Linear:
        """Refit W_O so that the converted stream after attention comes close to the trained one.

        A norm of the attention's output is not linear; before one, W_O is refitted to the trained output. The
        layer's head outputs, which do not depend on W_O, are kept for `advance_both`.
        """
        o, factor = converted.attention.o, converted.residual_multiplier
        heads = self._trained.new_empty(*self._trained.shape[:2], o.weight.shape[1])
        train, held_out = LeastSquares(o), LeastSquares(o)
        for sums, windows in ((train, self.train), (held_out, self.held_out)):
            for batch in self._batches(windows):
                target = self._attended[batch]
                if converted.attention_output_norm is None:
                    target = (self._trained[batch] + factor * target - self._converted[batch]) / factor
                heads[batch] = self._heads(converted, self._converted[batch])
                sums.add(heads[batch], target)
        self._converted_heads = heads
        return refit(o, train, held_out, fit_bias=fit_bias)

    def advance_both(self, layer: Layer, converted: Layer) -> float:
        """Advance both streams past the layer; returns the relative error of the converted one on held-out
        windows.

        After a `refit`, `converted` must be the layer that was refitted, with its new W_O.
        """
        self.advance(layer)
        heads, self._converted_heads = self._converted_heads, None
        for batch in self._all():
            if heads is None:
                attend: Callable[[Tensor], Tensor] = partial(attention_windows.attend, converted.attention)
            else:
                attend = _given(reference.linear(converted.attention.o, heads[batch]))
            self._converted[batch] = reference.run_block(converted, self._converted[batch], attend).residual
        target = self._trained[self.held_out.start :].double()
        error = (self._converted[self.held_out.start :] - target).square().sum()
        return float((error / target.square().sum().clamp_min(_TINY)).sqrt())

    def held_out_pairs(self, windows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Trained stream [1, S, hidden], converted stream [1, S, hidden] and token ids [1, S] of each
        held-out window.
        """
        for at in self.held_out:
            one = slice(at, at + 1)
            yield self._trained[one], self._converted[one], windows[one]
