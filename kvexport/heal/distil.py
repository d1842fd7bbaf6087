"""Healing in two phases: each layer towards the original's residual stream, then all layers towards its
logits.

All training is in float32. The result is never worse than the input on the held-out windows. In memory are:
the residual streams of the original and, in the first phase, of the converted model over all windows (tokens
· hidden · 4 bytes each); the converted layers; gradient, two moments and best value of each trained number;
the activations of 2048 tokens or one window (with adapters: those of one layer at a time); one layer of the
original.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from kvexport.errors import UsageError
from kvexport.heal.loss import advance, kl_gradient, kl_sum, parts, stream_error, stream_loss
from kvexport.heal.optimizer import RelativeAdam, batch_of
from kvexport.heal.report import HealOptions, HealReport, HealResult
from kvexport.heal.state import Counters, digest, load, save
from kvexport.heal.student import Student, in_dtype
from kvexport.model import reference
from kvexport.model.decoder import Decoder
from kvexport.progress import Progress

# Measured on a trained model of 5.9 M parameters: for equal CPU time the first phase gained most, and a high
# rate in the second phase lost that gain again.
LAYERWISE_SHARE = 0.8  # share of the steps in the first phase
END_TO_END_RATE = 0.1  # learning rate of the second phase, relative
_EVALUATIONS = 10
_PATIENCE = 4  # consecutive worse evaluations before an early stop
_TINY = torch.finfo(torch.float32).tiny


def heal(
    original: Decoder,
    converted: Decoder,
    windows: Tensor,
    held_out: Tensor,
    options: HealOptions,
    progress: Progress,
    state: Path | None = None,
) -> HealResult:
    """Train the attention weights of `converted` towards the original's predictions on `windows`.

    Args:
        original: the trained model.
        converted: the same model with converted attention.
        windows: training token ids [N, S] int64.
        held_out: token ids [M, S] int64 on which the best weights are chosen.
        options: steps, learning rate and adapters.
        progress: shows the steps.
        state: file for the state, written at every evaluation and loaded if it exists; the result is then
            bit-identical to that of an uninterrupted run. The caller deletes it. None: no state is saved.

    Raises:
        UsageError: there are no windows, or the state is damaged or of another job.
        CannotRunHere: adapters are requested and peft is not installed.
    """
    for name, ids in (("training", windows), ("held-out", held_out)):
        if ids.numel() == 0:
            raise UsageError(f"healing needs {name} windows", got=tuple(ids.shape), fix="use more --samples")
    return _Job(original, converted, windows, held_out, options, progress, state).run()


class _Job:
    def __init__(
        self,
        original: Decoder,
        converted: Decoder,
        windows: Tensor,
        held_out: Tensor,
        options: HealOptions,
        progress: Progress,
        state: Path | None,
    ) -> None:
        self.started = time.perf_counter()
        self.original, self.converted, self.windows, self.held_out = original, converted, windows, held_out
        self.options, self.progress, self.state = options, progress, state
        self.student = Student(converted, options.lora_rank, options.seed)
        self.layerwise_steps = round(LAYERWISE_SHARE * options.steps)
        self.steps = options.steps - self.layerwise_steps
        self.optimizer = RelativeAdam(
            self.student.scaled_parameters(), END_TO_END_RATE * options.learning_rate, self.steps
        )
        self.parameters = self.optimizer.parameters
        self.best = [parameter.detach().clone() for parameter in self.parameters]
        self.counters = Counters(layers=0, steps=0, best_step=0, curve=[], seconds=0.0)
        self.job = "" if state is None else digest((original, converted, windows, held_out, options))

    def run(self) -> HealResult:
        self._resume()
        left = (
            self.layerwise_steps * (len(self.student) - self.counters.layers)
            + self.steps
            - self.counters.steps
        )
        with self.progress.stage("Healing", left):
            teacher, held_out, before = self._layer_by_layer()
            if not self.counters.curve:
                self.counters.curve.append((0, before))
                if self.layerwise_steps:
                    self._evaluate(held_out)
            self._end_to_end(teacher, held_out)
        return self._finish(held_out, before)

    def _layer_by_layer(self) -> tuple[Tensor, Tensor, float]:
        """Run all layers, healing each one that is not healed yet.

        Returns:
            The original's residual streams after the last layer on training windows [N, S, hidden] and
            held-out windows [M, S, hidden], and the held-out KL of the given converted model.
        """
        unfinished = self.layerwise_steps > 0 and not self.counters.curve
        teacher, held_out = (
            reference.embed(self.student.ends.embedding, ids) for ids in (self.windows, self.held_out)
        )
        given, ours = held_out.clone(), (teacher.clone(), held_out.clone()) if unfinished else ()
        for index, original in enumerate(self.original.layers):
            layer = in_dtype(original, torch.float32)
            advance(layer, teacher)
            advance(layer, held_out)
            advance(self.student.given[index], given)
            if unfinished and index >= self.counters.layers:
                self._heal_layer(index, ours, (teacher, held_out))
                self.counters.layers = index + 1
                self._save()
            for stream in ours:
                advance(self.student.layer(index), stream)
        return teacher, held_out, self._kl(held_out, given)

    def _heal_layer(self, index: int, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
        """Train one layer to move the converted stream to the original's after it; restored if that gains
        nothing.
        """
        student = self.student
        optimizer = RelativeAdam(
            student.scaled_parameters(index), self.options.learning_rate, self.layerwise_steps
        )
        given = [parameter.detach().clone() for parameter in optimizer.parameters]
        before = stream_loss(student.layer(index), ours[1], theirs[1])
        for step in range(self.layerwise_steps):
            chosen = self._batch(step)
            for part in parts(len(chosen), ours[0].shape[1]):
                at = chosen[part].to(ours[0].device)
                x, target = ours[0][at], theirs[0][at]
                error = stream_error(student.layer(index), x, target)
                (error / (max(before, _TINY) * len(chosen) * x.shape[1])).backward()
            optimizer.step(step)
            self.progress.advance()
        if not stream_loss(student.layer(index), ours[1], theirs[1]) < before:
            _put(given, optimizer.parameters)

    def _end_to_end(self, teacher: Tensor, held_out: Tensor) -> None:
        """Train all layers towards the original's logits."""
        every = max(1, self.steps // _EVALUATIONS)
        while self.counters.steps < self.steps and not self._no_progress():
            chosen = self._batch(self.layerwise_steps + self.counters.steps)
            for part in parts(len(chosen), self.windows.shape[1]):
                stream = self.student.stream(self.windows[chosen[part]])
                target = teacher[chosen[part].to(teacher.device)]
                gradient = kl_gradient(self.student.ends, target, stream)
                stream.backward(gradient / (len(chosen) * stream.shape[1]))
            self.optimizer.step(self.counters.steps)
            self.counters.steps += 1
            self.progress.advance()
            due = self.counters.steps % every == 0 or self.counters.steps == self.steps
            if due and not self._evaluate(held_out):
                self.progress.note("healing stopped: the weights are no longer finite")
                return

    def _no_progress(self) -> bool:
        """Whether each of the last evaluations was worse than the one before it or than the given weights."""
        curve = [kl for _, kl in self.counters.curve]
        worse = [kl > min(before, curve[0]) for before, kl in pairwise(curve)]
        return len(worse) >= _PATIENCE and all(worse[-_PATIENCE:])

    def _evaluate(self, held_out: Tensor) -> bool:
        """Measure the current weights, keep them if they are the best so far, save; False if they are not
        finite.
        """
        kl = self._kl(held_out, self.student.held_out_stream(self.held_out))
        if not math.isfinite(kl):
            return False
        counters, step = self.counters, self.layerwise_steps + self.counters.steps
        if kl < min(earlier for _, earlier in counters.curve):
            counters.best_step = step
            _put([parameter.detach() for parameter in self.parameters], self.best)
        elif counters.steps == 0:
            # each layer gained on its own, but together they lost: start from the given weights
            _put(self.best, self.parameters)
        counters.curve.append((step, kl))
        self._save()
        return True

    def _kl(self, original: Tensor, converted: Tensor) -> float:
        """Mean KL for residual streams after the last layer on held-out windows, nats per token."""
        return kl_sum(self.student.ends, original, converted) / self.held_out.numel()

    def _finish(self, held_out: Tensor, before: float) -> HealResult:
        _put(self.best, self.parameters)
        after, step, healed = (
            min(kl for _, kl in self.counters.curve),
            self.counters.best_step,
            self.student.decoder(),
        )
        # rounding to a narrow dtype may undo the gain
        if self.converted.layers[0].attention.q.weight.dtype not in (torch.float32, torch.float64):
            layers = [in_dtype(layer, torch.float32) for layer in healed.layers]
            after = self._kl(held_out, self.student.held_out_stream(self.held_out, layers))
        if not (step and after < before):
            healed, after, step = self.converted, before, 0
        self.progress.note(
            f"healing changed the held-out KL from {before:.5f} to {after:.5f}, best at step {step}"
        )
        report = HealReport(
            steps=self.layerwise_steps + self.counters.steps,
            best_step=step,
            kl_before=before,
            kl_after=after,
            curve=tuple(self.counters.curve),
            trained_numbers=sum(parameter.numel() for parameter in self.parameters),
            seconds=round(self._seconds(), 3),
        )
        return HealResult(healed, report)

    def _batch(self, step: int) -> Tensor:
        return batch_of(len(self.windows), self.options.batch, self.options.seed, step)

    def _seconds(self) -> float:
        return self.counters.seconds + time.perf_counter() - self.started

    def _tensors(self) -> dict[str, list[Tensor]]:
        first, second = self.optimizer.moments()
        return {"present": list(self.parameters), "best": self.best, "first": first, "second": second}

    def _save(self) -> None:
        if self.state is not None:
            save(self.state, self.job, replace(self.counters, seconds=self._seconds()), self._tensors())

    def _resume(self) -> None:
        if self.state is None:
            return
        tensors = self._tensors()
        counters = load(self.state, self.job, tensors)
        if counters is not None:
            self.counters = counters
            self.optimizer.load(tensors["first"], tensors["second"], counters.steps)
            self.progress.note(f"healing continues from {self.state}")


@torch.no_grad()
def _put(values: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    for value, target in zip(values, into, strict=True):
        target.copy_(value)
