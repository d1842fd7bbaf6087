"""Measure the prefill and decode times of one bundle, or of two that alternate in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from kvexport.errors import UsageError
from kvexport.progress import Progress
from kvexport.runtime.session import Session

_WARM_UP_STEPS = 3  # uncounted steps at each depth; of the prefill, one call is uncounted
_DEFAULT_PROMPT, _DEFAULT_DEPTHS = 512, (0, 512, 4096)
_IDLE_INTERVAL = 0.01  # seconds between two readings of the processor time
_IDLE_READINGS = 200  # at most
_IDLE_SECONDS = 0.002  # processor time of an idle process in one interval, at most


@dataclass(frozen=True)
class BenchOptions:
    """What to measure. The field names are keys of the JSON that `kvexport bench` writes.

    Attributes:
        prompt: tokens of a prefill.
        depths: context lengths in tokens at which decode starts, in ascending order, one measurement each.
            All tokens are in the cache, except those that were evicted.
        steps: tokens decoded one by one at each depth.
        repetitions: counted prefills.
        seed: random seed of the token ids in prompt and cache.
    """

    prompt: int
    depths: tuple[int, ...]
    steps: int
    repetitions: int
    seed: int

    @classmethod
    def fitting(
        cls,
        sessions: Sequence[Session],
        prompt: int | None,
        depths: Sequence[int] | None,
        steps: int,
        repetitions: int,
        seed: int,
    ) -> BenchOptions:
        """Make options. A prompt or depths of None become the usual ones that fit every session's
        capacity."""
        capacity = min(session.capacity for session in sessions)
        defaults = [depth for depth in _DEFAULT_DEPTHS if depth + _WARM_UP_STEPS + steps <= capacity] or [0]
        chosen = sorted(set(defaults if depths is None else depths))
        return cls(prompt or min(_DEFAULT_PROMPT, capacity), tuple(chosen), steps, repetitions, seed)

    def check(self, sessions: Sequence[Session]) -> None:
        """Require that prompt and depths fit.

        Raises:
            UsageError: the prompt or a depth exceeds a session's capacity.
        """
        for session in sessions:
            decoded = _WARM_UP_STEPS + self.steps
            needed = ("-p", self.prompt, 0), ("-d", max(self.depths), decoded)
            for option, tokens, more in needed:
                if tokens + more > session.capacity:
                    steps = f", and {more} decoded tokens" if more else ""
                    smaller = f"{option} or -n" if more else option
                    raise UsageError(
                        f"{option} must fit the capacity of {session.bundle.path}",
                        got=f"{tokens}{steps}",
                        expected=f"at most {session.capacity} in total",
                        fix=f"choose a smaller {smaller}, or, if the model supports that length, "
                        f"build again with --capacity {tokens + more}",
                    )

    def to_json(self) -> dict[str, Any]:
        """The options as JSON values, with the number of uncounted calls."""
        return {**asdict(self), "uncounted": {"prefill": 1, "decode": _WARM_UP_STEPS}}


@dataclass(frozen=True)
class Point:
    """The times of one prefill length, or of decode at one depth.

    Attributes:
        depth: context length in tokens at which decode started; for a prefill, its length.
        tokens: tokens of one call.
        p50_ms, p90_ms, p99_ms: percentiles of the time of a call in milliseconds.
        tokens_per_second: at the median.
        samples_ms: time of every counted call in order, in milliseconds.
    """

    depth: int
    tokens: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    tokens_per_second: float
    samples_ms: tuple[float, ...]


@dataclass(frozen=True)
class Result:
    """The measurements of one bundle.

    Attributes:
        kv_budget: tokens of a sequence in the cache of a layer that evicts; None if no layer evicts.
        kv_bytes_planned: bytes of the cache at the deepest point, by the bundle's shapes and budget.
        kv_bytes_allocated: bytes of the cache that the session has allocated there.
        device: the device's memory at the end; None on the CPU.
        peak_device_bytes: the most device memory in use by all processes, read after the prefills and after
            the steps of each depth. ONNX Runtime and TensorRT never give memory back, so that no peak is
            missed.
    """

    provider: str
    prefill: tuple[Point, ...]
    decode: tuple[Point, ...]
    kv_budget: int | None
    kv_bytes_planned: int
    kv_bytes_allocated: int
    device: dict[str, Any] | None
    peak_device_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self)


class _Measurement:
    """One session, and its measurements so far."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.prefill: list[Point] = []
        self.decode: list[Point] = []
        self.seconds: list[float] = []  # counted calls since the last point
        self._memory_in_use: list[int] = []

    def call(self, function: Callable[[], object], counted: bool) -> None:
        """Call and time a function."""
        begin = time.perf_counter()
        function()
        seconds = time.perf_counter() - begin
        if counted:
            self.seconds.append(seconds)

    def read_memory(self) -> None:
        """Record how much of the device's memory is in use."""
        if (device := self.session.memory().device) is not None:
            self._memory_in_use.append(device.total - device.free)

    def point(self, depth: int, tokens: int) -> Point:
        """The calls since the last point."""
        seconds, self.seconds = self.seconds, []
        return _point(depth, tokens, seconds)

    def result(self) -> Result:
        memory = self.session.memory()
        return Result(
            provider=self.session.provider,
            prefill=tuple(self.prefill),
            decode=tuple(self.decode),
            kv_budget=memory.budget,
            kv_bytes_planned=sum(
                self.session.bundle.kv_bytes(int(length)) for length in self.session.lengths
            ),
            kv_bytes_allocated=memory.bytes_allocated,
            device=None if memory.device is None else asdict(memory.device),
            peak_device_bytes=max(self._memory_in_use, default=None),
        )


def measure(sessions: Sequence[Session], options: BenchOptions, progress: Progress) -> list[Result]:
    """Measure sessions that alternate call by call, so that a disturbance of the machine affects all of them.

    Every session gets the same tokens. The first calls of each measurement are not counted. With several
    sessions, a call starts only when the threads of the session before are idle.

    Raises:
        UsageError: as `BenchOptions.check`.
    """
    options.check(sessions)
    random = np.random.default_rng(options.seed)
    vocab = min(session.bundle.model.vocab_size for session in sessions)
    ids = random.integers(0, vocab, max(options.prompt, *options.depths, 1)).tolist()
    measurements = [_Measurement(session) for session in sessions]
    with progress.stage("Prefill", 1 + options.repetitions):
        for repetition in range(1 + options.repetitions):
            for each in measurements:
                if len(measurements) > 1:
                    _wait_until_idle()
                each.call(partial(each.session.prefill, ids[: options.prompt]), counted=repetition > 0)
            progress.advance()
    for each in measurements:
        each.read_memory()
        each.prefill.append(each.point(options.prompt, options.prompt))
    for depth in options.depths:
        with progress.stage(f"Decode at {depth}", _WARM_UP_STEPS + options.steps):
            for each in measurements:
                if depth:
                    each.session.prefill(ids[:depth])
                else:
                    each.session.reset()
            for step in range(_WARM_UP_STEPS + options.steps):
                for each in measurements:
                    if len(measurements) > 1:
                        _wait_until_idle()
                    token = ids[step % len(ids)]
                    each.call(partial(each.session.step, [token]), counted=step >= _WARM_UP_STEPS)
                progress.advance()
        for each in measurements:
            each.read_memory()
            each.decode.append(each.point(depth, 1))
    return [each.result() for each in measurements]


def _wait_until_idle() -> None:
    """Wait until no thread of this process runs, for two seconds at most.

    ONNX Runtime's threads spin for some hundredths of a second after a call, and would take processor time
    from the next session's call: its steps took twice as long.
    """
    for _ in range(_IDLE_READINGS):
        before = time.process_time()
        time.sleep(_IDLE_INTERVAL)
        if time.process_time() - before < _IDLE_SECONDS:
            return


def ratios(one: Result, other: Result) -> list[dict[str, Any]]:
    """Times of `other` over times of `one`, call by call: median and quartiles of the prefill and each
    depth."""
    compared = []
    for stage in ("prefill", "decode"):
        for a, b in zip(getattr(one, stage), getattr(other, stage), strict=True):
            each = [theirs / ours for ours, theirs in zip(a.samples_ms, b.samples_ms, strict=True)]
            low, median, high = statistics.quantiles(each, n=4) if len(each) > 1 else (each[0],) * 3
            compared.append({"stage": stage, "depth": a.depth, "median": median, "quartiles": [low, high]})
    return compared


def _point(depth: int, tokens: int, seconds: Sequence[float]) -> Point:
    milliseconds = 1000 * np.array(seconds)
    p50, p90, p99 = (float(each) for each in np.percentile(milliseconds, (50, 90, 99)))
    samples = tuple(round(float(each), 4) for each in milliseconds)
    return Point(
        depth, tokens, round(p50, 4), round(p90, 4), round(p99, 4), round(1000 * tokens / p50, 2), samples
    )
