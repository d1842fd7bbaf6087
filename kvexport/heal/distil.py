"""The flow of healing: layer by layer against the original's stream, then all layers against its logits.

Knows the order of things, when to stop, and that nothing worse than what was given may be returned. All training is
in float32. Held in memory: the original's and, layer by layer, the converted residual stream of all windows
(tokens · hidden · 4 bytes each), the converted layers, for each trained number its gradient, two moments and its best
value, and the activations of 2048 tokens or one window; with adapters, the activations and the sums of weight and
adapter of one layer at a time. Of the original: one layer at a time.
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
from kvexport.heal.report import Healed, HealOptions, HealReport
from kvexport.heal.state import Counters, digest, load, save
from kvexport.heal.student import Student, in_dtype
from kvexport.model import reference
from kvexport.model.decoder import Decoder
from kvexport.progress import Progress

# Measured on a trained model of 5.9 M parameters: of equal CPU time, layers alone took off most, and a high rate end
# to end first undid what they had gained.
_LAYERWISE = 0.8  # share of the steps
_END_TO_END = 0.1  # of the learning rate
_EVALUATIONS = 10
_PATIENCE = 4  # evaluations in a row that only got worse
_TINY = torch.finfo(torch.float32).tiny


def heal(
    original: Decoder,
    converted: Decoder,
    windows: Tensor,
    held_out: Tensor,
    options: HealOptions,
    progress: Progress,
    state: Path | None = None,
) -> Healed:
    """Train the attention weights of `converted` towards the original's predictions on `windows`.

    Args:
        original, converted: the same model but for the layers' attention.
        windows: token ids [N, S] int64 to train on.
        held_out: token ids [M, S] int64 by which the best weights are chosen.
        state: a file where the work is saved at every evaluation, and taken up again if it is there. The result is the
            same to the bit as without an interruption. The caller deletes it.

    Raises:
        UsageError: no windows, or a state that is damaged or of another job.
        CannotRunHere: adapters are asked for and peft is not installed.
    """
    for name, given in (("to heal on", windows), ("held out", held_out)):
        if given.numel() == 0:
            raise UsageError(f"there are no windows {name}", got=tuple(given.shape), fix="use more --samples")
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
        self.layerwise_steps = round(_LAYERWISE * options.steps)
        self.steps = options.steps - self.layerwise_steps
        self.optimizer = RelativeAdam(self.student.scaled(), _END_TO_END * options.learning_rate, self.steps)
        self.parameters = self.optimizer.parameters
        self.best = [parameter.detach().clone() for parameter in self.parameters]
        self.counters = Counters(layers=0, steps=0, best_step=0, curve=[], seconds=0.0)
        self.job = "" if state is None else digest((original, converted, windows, held_out, options))

    def run(self) -> Healed:
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
        """The original's last residual streams of both sets of windows, and the held-out KL of what was given.

        On the way, each layer is healed that is still to be healed on its own.
        """
        rope, unfinished = self.original.rope, self.layerwise_steps > 0 and not self.counters.curve
        teacher, held_out = (
            reference.embed(self.student.ends.embedding, ids) for ids in (self.windows, self.held_out)
        )
        given, ours = held_out.clone(), (teacher.clone(), held_out.clone()) if unfinished else ()
        for index, original in enumerate(self.original.layers):
            layer = in_dtype(original, torch.float32)
            advance(layer, teacher, rope)
            advance(layer, held_out, rope)
            advance(self.student.given[index], given, rope)
            if unfinished and index >= self.counters.layers:
                self._heal_layer(index, ours, (teacher, held_out))
                self.counters.layers = index + 1
                self._save()
            for stream in ours:
                advance(self.student.layer(index), stream, rope)
        return teacher, held_out, self._kl(held_out, given)

    def _heal_layer(self, index: int, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
        """Train one layer to take the converted stream to where the original's is after it; undone if that gains nothing."""
        student, rope = self.student, self.original.rope
        optimizer = RelativeAdam(student.scaled(index), self.options.learning_rate, self.layerwise_steps)
        given = [parameter.detach().clone() for parameter in optimizer.parameters]
        before = stream_loss(student.layer(index), ours[1], theirs[1], rope)
        for step in range(self.layerwise_steps):
            chosen = self._batch(step)
            for part in parts(len(chosen), ours[0].shape[1]):
                x, target = ours[0][chosen[part]], theirs[0][chosen[part]]
                error = stream_error(student.layer(index), x, target, rope)
                (error / (max(before, _TINY) * len(chosen) * x.shape[1])).backward()
            optimizer.step(step)
            self.progress.advance()
        if not stream_loss(student.layer(index), ours[1], theirs[1], rope) < before:
            _put(given, optimizer.parameters)

    def _end_to_end(self, teacher: Tensor, held_out: Tensor) -> None:
        every = max(1, self.steps // _EVALUATIONS)
        while self.counters.steps < self.steps and not self._hopeless():
            chosen = self._batch(self.layerwise_steps + self.counters.steps)
            for part in parts(len(chosen), self.windows.shape[1]):
                stream = self.student.stream(self.windows[chosen[part]])
                gradient = kl_gradient(self.student.ends, teacher[chosen[part]], stream)
                stream.backward(gradient / (len(chosen) * stream.shape[1]))
            self.optimizer.step(self.counters.steps)
            self.counters.steps += 1
            self.progress.advance()
            due = self.counters.steps % every == 0 or self.counters.steps == self.steps
            if due and not self._evaluate(held_out):
                self.progress.note("healing stopped: the weights are not finite any more")
                return

    def _hopeless(self) -> bool:
        """Whether the last evaluations were each worse than the one before, or than what was given."""
        found = [kl for _, kl in self.counters.curve]
        worse = [kl > min(before, found[0]) for before, kl in pairwise(found)]
        return len(worse) >= _PATIENCE and all(worse[-_PATIENCE:])

    def _evaluate(self, held_out: Tensor) -> bool:
        """Measure the present weights, keep them if they are the best yet, save; False: they are not finite."""
        kl = self._kl(held_out, self.student.held_out_stream(self.held_out))
        if not math.isfinite(kl):
            return False
        counters, step = self.counters, self.layerwise_steps + self.counters.steps
        if kl < min(seen for _, seen in counters.curve):
            counters.best_step = step
            _put([parameter.detach() for parameter in self.parameters], self.best)
        elif counters.steps == 0:
            _put(
                self.best, self.parameters
            )  # layers that gained each on its own lost together: start from what was given
        counters.curve.append((step, kl))
        self._save()
        return True

    def _kl(self, original: Tensor, converted: Tensor) -> float:
        """Mean KL of last residual streams of the held-out windows, nats per token."""
        return kl_sum(self.student.ends, original, converted) / self.held_out.numel()

    def _finish(self, held_out: Tensor, before: float) -> Healed:
        _put(self.best, self.parameters)
        after, step, healed = (
            min(kl for _, kl in self.counters.curve),
            self.counters.best_step,
            self.student.decoder(),
        )
        if self.converted.layers[0].attention.q.weight.dtype not in (
            torch.float32,
            torch.float64,
        ):  # rounding may cost it all
            layers = [in_dtype(layer, torch.float32) for layer in healed.layers]
            after = self._kl(held_out, self.student.held_out_stream(self.held_out, layers))
        if not (step and after < before):
            healed, after, step = self.converted, before, 0
        self.progress.note(
            f"healing took the held-out KL from {before:.5f} to {after:.5f}, best at step {step}"
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
        return Healed(healed, report)

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
        found = load(self.state, self.job, tensors)
        if found is not None:
            self.counters = found
            self.optimizer.load(tensors["first"], tensors["second"], found.steps)
            self.progress.note(f"healing goes on from {self.state}")


@torch.no_grad()
def _put(values: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    for value, target in zip(values, into, strict=True):
        target.copy_(value)
