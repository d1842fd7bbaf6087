"""Sensitivity of the model to each layer's loss: how much KL a given error of its keys or values causes.

Per layer, method and group size, `LayerLosses` gives the loss of keys and of values at every width. What a
unit of loss costs is measured by trials: the layer's keys alone are coded, then its values alone, and the
disturbed residual stream runs through the remaining trained layers to the logits. Sensitivity = KL to the
trained logits / predicted loss; the predicted KL of a plan is the sum of sensitivity times loss over keys,
values and layers.

One layer is in memory at a time, and one residual stream over a few windows per trial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvexport.calibrate import Moments
from kvexport.calibrate import windows as attention_windows
from kvexport.convert.apply import LayerCode, apply_code
from kvexport.convert.code_moments import CodeMoments, make_code_moments
from kvexport.convert.codes import Code
from kvexport.convert.groups import WIDEST, Grouping, KVShape, trained_shape
from kvexport.convert.layer_sensitivity import Curves, LayerSensitivity
from kvexport.convert.losses import LayerLosses
from kvexport.convert.matching import Group, match_heads, order_of
from kvexport.convert.methods import Method, in_layer, layer_code
from kvexport.convert.permute import permute_heads
from kvexport.convert.streams import TrainedStream
from kvexport.model import reference
from kvexport.model.decoder import Attention, Decoder, Layer
from kvexport.model.divergence import DivergenceMeter
from kvexport.progress import Progress

_WINDOWS = 8  # windows that trials run over
_RATIO = 0.5  # share of the KV bytes that trials keep, and for which heads are matched
_TINY = 1e-12  # of the output's power: lower bound on the loss of a trial


@dataclass(frozen=True)
class _Trial:
    """Trials of one method in one layer: the layer with coded keys, with coded values, and both predicted
    losses.
    """

    keys: Layer
    values: Layer
    key_loss: float
    value_loss: float


class SensitivityAnalysis:
    """An iterator that measures one layer per step; made by `analyze_sensitivity`.

    Attributes:
        layers: one entry per layer, once the iterator has ended.
    """

    @torch.no_grad()
    def __init__(
        self,
        decoder: Decoder,
        windows: Tensor,
        methods: Sequence[Method],
        sizes: Sequence[int],
        moments_of: Callable[[int], Moments] | None,
        save_moments: Callable[[int, Moments], None] | None,
        capacity: int | None,
    ) -> None:
        self._decoder, self._methods, self._sizes = decoder, methods, tuple(sizes)
        self._moments_of, self._save_moments = moments_of, save_moments
        self._positions = windows.shape[1] if capacity is None else capacity
        self._stream = TrainedStream(decoder, windows)
        train = self._stream.train
        self._trial_windows = windows[
            torch.linspace(0, len(train) - 1, min(_WINDOWS, len(train))).round().long()
        ]
        # the trained stream, then the disturbed stream of each trial
        self._forks = [reference.embed(decoder.embedding, self._trial_windows)]
        # each layer without its sensitivities, and the predicted losses of its trials
        self._measured: list[tuple[LayerSensitivity, list[float]]] = []
        self.layers: list[LayerSensitivity] = []

    def __iter__(self) -> Iterator[None]:
        for index in range(len(self._decoder.layers)):
            self._measure(index)
            yield
        self._finish()

    @torch.no_grad()
    def _measure(self, index: int) -> None:
        layer = self._decoder.layers[index]
        if self._moments_of is None:
            moments = self._stream.measure(layer)
            if self._save_moments is not None:
                self._save_moments(index, moments)
        else:
            self._stream.attend(layer)
            moments = self._moments_of(index)
        curves, trials = dict[tuple[Method, int], Curves](), list[_Trial]()
        trial_size = self._trial_size(layer.attention)
        for chosen in self._methods:
            method = in_layer(chosen, layer.attention)
            code_moments = make_code_moments(
                method.before_rotation, moments, layer.attention, self._positions
            )
            losses = LayerLosses(code_moments, layer.attention)
            for size in self._sizes:
                groups = self._groups(method, losses, layer.attention, size)
                of_keys = losses.folded_keys if method.key is None else losses.keys
                of_size = Curves(sum_of(map(of_keys, groups)), sum_of(map(losses.values, groups)))
                curves[chosen, size] = of_size
                if size == trial_size:
                    trials.append(self._trial(layer, code_moments, method, groups, of_size))
        least = _TINY * float(moments.output_power)
        lost = [max(loss, least) for loss in (trials[0].value_loss, *(each.key_loss for each in trials))]
        shape, power = trained_shape(layer.attention), float(moments.output_power)
        self._measured.append((LayerSensitivity(shape, self._sizes, curves, power, {}, 0.0), lost))
        disturbed = [
            self._past(each, self._forks[0]) for each in (trials[0].values, *(each.keys for each in trials))
        ]
        self._forks = [self._past(layer, fork) for fork in self._forks] + disturbed
        self._stream.advance(layer)

    def _rank(self, size: int, attention: Attention) -> int:
        """The even width of a cached head that keeps the ratio of the KV bytes, in groups of `size`."""
        return max(2, 2 * round(_RATIO * size * attention.head_dim / 2))

    def _trial_size(self, attention: Attention) -> int:
        """The largest group size whose width in a trial an engine supports."""
        return max(
            (size for size in self._sizes if self._rank(size, attention) <= WIDEST), default=self._sizes[0]
        )

    def _groups(self, method: Method, losses: LayerLosses, attention: Attention, size: int) -> list[Group]:
        def loss(group: Group) -> float:
            # part of a group gets its share of the width
            width = self._rank(size, attention) * len(group) // size
            return float(losses.estimate(method.before_rotation, group)[width] + losses.values(group)[width])

        return match_heads(attention.num_kv_heads, size, loss)

    def _trial(
        self,
        layer: Layer,
        code_moments: CodeMoments,
        method: Method,
        groups: Sequence[Group],
        curves: Curves,
    ) -> _Trial:
        order = order_of(groups)
        attention, code_moments = permute_heads(layer.attention, order), code_moments.permute_heads(order)
        grouping = Grouping.of(attention, len(groups))
        n = grouping.size * grouping.head_dim
        rank = min(self._rank(grouping.size, attention), WIDEST)
        code = layer_code(method, code_moments, attention, grouping, KVShape(grouping.kv_heads, rank, rank))
        exact = (
            Code(torch.eye(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)),
        ) * grouping.kv_heads

        def apply(code: LayerCode) -> Layer:
            converted = apply_code(attention, grouping, code, code_moments.moments.value_mean)
            return replace(layer, attention=converted)

        return _Trial(
            keys=apply(replace(code, values=exact)),
            values=apply(replace(code, keys=exact, folds=False, frequencies=None)),
            key_loss=float(curves.keys[rank]),
            value_loss=float(curves.values[rank]),
        )

    def _past(self, layer: Layer, x: Tensor) -> Tensor:
        """The residual stream x [N, S, hidden] after the layer."""
        stream = x.clone()
        attention_windows.advance(layer, stream)
        return stream

    @torch.no_grad()
    def _finish(self) -> None:
        trained, *disturbed = self._forks
        divergences = iter([self._kl(trained, each) for each in disturbed])
        for layer, lost in self._measured:
            of_values, *of_keys = (_sensitivity(next(divergences), loss) for loss in lost)
            by_method = dict(zip(self._methods, of_keys, strict=True))
            self.layers.append(replace(layer, key_sensitivity=by_method, value_sensitivity=of_values))

    def _kl(self, trained: Tensor, disturbed: Tensor) -> float:
        """Mean KL of the logits of two residual streams [N, S, hidden], nats per token."""
        meter = DivergenceMeter()
        for at in range(len(trained)):
            one = slice(at, at + 1)
            original, changed = (reference.logits(self._decoder, each[one]) for each in (trained, disturbed))
            meter.add(original, changed, self._trial_windows[one])
        return meter.finish().mean_kl


def _sensitivity(kl: float, loss: float) -> float:
    return kl / loss if loss > 0 else 0.0  # a layer whose attention output is constant loses nothing


def analyze_sensitivity(
    decoder: Decoder,
    windows: Tensor,
    methods: Sequence[Method],
    sizes: Sequence[int],
    *,
    moments_of: Callable[[int], Moments] | None = None,
    save_moments: Callable[[int, Moments], None] | None = None,
    capacity: int | None = None,
    progress: Progress | None = None,
) -> list[LayerSensitivity]:
    """Measure every layer's sensitivity.

    Args:
        decoder: the trained model.
        windows: calibration tokens [N, length] int64.
        methods: methods that match heads; they predict their losses.
        sizes: group sizes, ascending. Trials use the largest whose width fits an engine's widest head.
        moments_of: returns the saved moments of a layer; None: moments are measured on `windows`.
        save_moments: called with the index and the moments of each layer that is measured.
        capacity: tokens of a sequence for which codes of rotated keys are made [default: length].
        progress: shows the stage.
    """
    progress = progress or Progress()
    analysis = SensitivityAnalysis(decoder, windows, methods, sizes, moments_of, save_moments, capacity)
    with progress.stage("Analyzing layer sensitivity", len(decoder.layers)):
        for _ in analysis:
            progress.advance()
    return analysis.layers


def sum_of(parts: Iterator[Tensor]) -> Tensor:
    """Sum of tensors of one shape."""
    return torch.stack(list(parts)).sum(0)
