"""Sensitivity of the model to each layer's loss: how much KL a given error of its keys or values causes.

Per layer, method and group size, `LayerLosses` gives the loss of keys and of values at every width. What a
unit of loss costs is measured in two passes over a few windows. Forward, each layer's keys alone, then its
values alone, are coded, which gives the error Δo_t of its attention output at each position t. Backward, the
gradients g_t of scores give the KL that the error causes,

    KL = ½ E[Σ_t (gᵀ_t Δo_t)²],

`kvexport.convert.score_gradients` with the errors of different positions uncorrelated. Sensitivity = KL /
predicted loss; the predicted KL of a plan is the sum of sensitivity times loss over keys, values and layers.

One layer is in memory at a time, and the activations of the windows are on disk; the cost is linear in the
number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from kvexport.calibrate import Moments
from kvexport.calibrate import windows as attention_windows
from kvexport.convert.groups import trained_shape
from kvexport.convert.layer_sensitivity import LayerSensitivity
from kvexport.convert.methods import Method
from kvexport.convert.score_gradients import ScoreGradients
from kvexport.convert.streams import TrainedStream, split_windows
from kvexport.convert.trials import LayerTrials, make_trials
from kvexport.files.malloc import return_freed
from kvexport.files.safetensors_io import save_tensors
from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer
from kvexport.model.placement import CPU, move
from kvexport.progress import Progress

_WINDOWS = 16  # windows on which trials are made: sensitivities are then accurate to about a tenth


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
    folder: Path | None = None,
) -> list[LayerSensitivity]:
    """Measure every layer's sensitivity.

    Args:
        decoder: the trained model.
        windows: calibration tokens [N, length] int64.
        methods: methods that match heads; they predict their losses.
        sizes: group sizes, ascending. Trials use the largest whose width fits an engine's widest head.
        moments_of: returns the saved moments of a layer; None: moments are measured on `windows`.
        save_moments: called with the index and the moments of each layer.
        capacity: tokens of a sequence for which codes of rotated keys are made [default: length].
        progress: shows the stage.
        folder: where activations are kept meanwhile [default: the system's temporary folder].
    """
    progress = progress or Progress()
    count = len(decoder.layers)
    with (
        TemporaryDirectory(dir=folder, prefix="activations.") as activations,
        progress.stage("Analyzing layer sensitivity", 2 * count),
    ):
        forward = _Forward(
            decoder, windows, methods, sizes, moments_of, save_moments, capacity, Path(activations)
        )
        for index in range(count):
            forward.run_layer(index)
            return_freed()
            progress.advance()
        backward = _Backward(decoder, forward.x, Path(activations))
        losses = list[list[float]]()
        for index in reversed(range(count)):
            losses.append(backward.run_layer(index))
            return_freed()
            progress.advance()
    return [
        _with_sensitivities(layer, lost, kl)
        for (layer, lost), kl in zip(forward.layers, reversed(losses), strict=True)
    ]


def _with_sensitivities(layer: LayerSensitivity, lost: list[float], kl: list[float]) -> LayerSensitivity:
    """The layer with the KL of its trials over their predicted losses; the first trial is that of values."""
    # a layer whose attention output is constant loses nothing
    of_values, *of_keys = (each / loss if loss > 0 else 0.0 for each, loss in zip(kl, lost, strict=True))
    return replace(
        layer,
        value_sensitivity=of_values,
        key_sensitivity=dict(zip(layer.key_sensitivity, of_keys, strict=True)),
    )


class _Forward:
    """The pass from the first layer to the last: losses, and the errors of trials.

    Attributes:
        layers: of each layer, its losses without sensitivities, and the predicted losses of its trials.
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
        folder: Path,
    ) -> None:
        self._decoder, self._methods, self._sizes, self._folder = decoder, methods, tuple(sizes), folder
        self._moments_of, self._save_moments = moments_of, save_moments
        self._positions = windows.shape[1] if capacity is None else capacity
        train, _ = split_windows(len(windows))
        which = trial_windows(len(train))
        if moments_of is not None:  # the other windows are not needed
            windows, which = windows[which], torch.arange(len(which))
        self._stream = TrainedStream(decoder, windows[: len(train)], hold_out=False)
        self._which = which
        self.layers: list[tuple[LayerSensitivity, list[float]]] = []

    @torch.no_grad()
    def run_layer(self, index: int) -> None:
        layer = self._decoder.layers[index]
        moments = self._moments(index, layer)
        trials = make_trials(move(layer.attention, CPU), moments, self._methods, self._sizes, self._positions)
        return_freed()
        self._keep(index, layer, trials)
        self.layers.append(
            (
                LayerSensitivity(
                    trained=trained_shape(layer.attention),
                    sizes=self._sizes,
                    curves=trials.curves,
                    output_power=float(moments.output_power),
                    key_sensitivity=dict.fromkeys(trials.keys, 0.0),
                    value_sensitivity=0.0,
                ),
                [trial.loss for trial in trials.all],
            )
        )
        self._stream.advance(layer)

    @property
    def x(self) -> Tensor:
        """The trained residual stream of the windows that trials are made on, [N, S, hidden]."""
        return self._stream.of_windows(self._which)[0]

    def _moments(self, index: int, layer: Layer) -> Moments:
        if self._moments_of is None:
            moments = self._stream.measure(layer)
        else:
            self._stream.attend(layer)
            moments = self._moments_of(index)
        if self._save_moments is not None:
            self._save_moments(index, moments)
        return moments

    def _keep(self, index: int, layer: Layer, trials: LayerTrials) -> None:
        """Keep the residual stream before the layer, and the errors [trials, N, S, hidden]."""
        x, trained = self._stream.of_windows(self._which)
        attention = layer.attention
        errors = torch.empty(len(trials.all), *x.shape, dtype=torch.bfloat16, device=x.device)
        for batch in attention_windows.batches(range(len(x)), x.shape[1]):
            inner = reference.normed(layer.attention_norm, x[batch])
            projected = attention_windows.project(attention, inner)
            for at, trial in enumerate(trials.all):
                heads = attention_windows.head_outputs(attention, trial.code(projected))
                errors[at, batch] = reference.linear(attention.o, heads) - trained[batch]
        save_tensors({"x": x.cpu(), "errors": errors.cpu()}, self._folder / str(index))


class _Backward:
    """The pass from the last layer to the first."""

    def __init__(self, decoder: Decoder, x: Tensor, folder: Path) -> None:
        """
        Args:
            x: the trained residual stream after the last layer, [N, S, hidden].
            folder: what the forward pass kept there.
        """
        self._decoder, self._folder, self._device = decoder, folder, x.device
        self._gradients = ScoreGradients(decoder, x)

    def run_layer(self, index: int) -> list[float]:
        """Mean KL in nats per prediction of each trial of the layer."""
        from safetensors.torch import load_file

        file = self._folder / str(index)
        kept = load_file(file)
        file.unlink()
        x, errors = (kept[name].to(self._device) for name in ("x", "errors"))
        gradients = self._gradients.go_back(self._decoder.layers[index], x)
        predictions = len(x) * (x.shape[1] - 1)
        return [
            float((gradients * error).sum(-1).double().square().sum()) / (2 * predictions) for error in errors
        ]


def trial_windows(count: int) -> Tensor:
    """Indices of the windows on which trials are made, evenly spread over `count` training windows, [N]."""
    return torch.linspace(0, count - 1, min(_WINDOWS, count)).round().long()
