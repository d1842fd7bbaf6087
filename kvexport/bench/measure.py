"""Times of prefill and decode of one bundle, or of two that take turns in one process.

Knows sessions and clocks; must not know what a machine tells of itself, nor how results are shown.
"""

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

_WARM = 3  # steps at each depth before those that count; of a prefill, one call
_PROMPT, _USUAL = 512, (0, 512, 4096)
_LOOK, _LOOKS, _AT_REST = (
    0.01,
    200,
    0.002,
)  # seconds between looks, how many at most, processor seconds between two of them


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        prompt: tokens of a prefill; decode is measured apart.
        depths: tokens of the text when decoding begins, one measurement each, the shallowest first; all of them are in the
            cache, but for those that were evicted.
        steps: tokens decoded at each depth, one by one; the text grows by as many.
        repetitions: of the prefill.
        seed: of the random token ids that fill prompt and cache.
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
    ) -> Plan:
        """A plan whose prompt and depths, where they are None, are those of the usual ones that the sessions have room for."""
        room = min(session.capacity for session in sessions)
        fitting = [depth for depth in _USUAL if depth + _WARM + steps <= room] or [0]
        chosen = sorted(set(fitting if depths is None else depths))
        return cls(prompt or min(_PROMPT, room), tuple(chosen), steps, repetitions, seed)

    def check(self, sessions: Sequence[Session]) -> None:
        """Refuse what does not fit.

        Raises:
            UsageError: a prompt or a depth is beyond a session's capacity.
        """
        for session in sessions:
            decoded = _WARM + self.steps
            wanted = ("-p", self.prompt, 0), ("-d", max(self.depths), decoded)
            for option, tokens, more in wanted:
                if tokens + more > session.capacity:
                    steps = f", and the {more} tokens that are decoded" if more else ""
                    fewer = f"{option} or -n" if more else option
                    raise UsageError(
                        f"{option} asks for more tokens than {session.bundle.path} has room for",
                        got=f"{tokens}{steps}",
                        expected=f"{session.capacity} in all",
                        fix=f"choose a smaller {fewer}, or build again with --capacity {tokens + more} or more",
                    )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with the calls that do not count."""
        return {**asdict(self), "uncounted": {"prefill": 1, "decode": _WARM}}


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        depth: tokens of the text when decoding began; of a prefill, its tokens.
        tokens: that a call takes.
        p50_ms, p90_ms, p99_ms: percentiles of a call's time.
        tokens_per_second: at the median.
        samples_ms: every call, in order.
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
    """One bundle's figures.

    Attributes:
        kv_budget: tokens of a sequence that layers hold which evict; None: no layer does.
        kv_bytes_planned: of the deepest point, all its tokens or as many as the budget, as the bundle's shapes say.
        kv_bytes_allocated: what the session holds there.
        device: what is known of the device's memory at the end; None on the CPU.
        peak_device_bytes: the most of it that the driver said was in use, by whomever, after a prefill or the steps of a
            depth. ONNX Runtime and TensorRT keep what they once took, so that nothing is missed between.
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
        """Plain JSON values."""
        return asdict(self)


class _Turn:
    """One session, and what was found of it so far."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.prefill: list[Point] = []
        self.decode: list[Point] = []
        self.seconds: list[float] = []  # of the measurement that is going on
        self._in_use: list[int] = []

    def call(self, do: Callable[[], object], counts: bool) -> None:
        begin = time.perf_counter()
        do()
        taken = time.perf_counter() - begin
        if counts:
            self.seconds.append(taken)

    def look(self) -> None:
        """See how much of the device's memory is in use."""
        if (device := self.session.memory().device) is not None:
            self._in_use.append(device.total - device.free)

    def point(self, depth: int, tokens: int) -> Point:
        """What was timed since the last point."""
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
            peak_device_bytes=max(self._in_use, default=None),
        )


def measure(sessions: Sequence[Session], plan: Plan, progress: Progress) -> list[Result]:
    """Measure sessions that take turns, call by call, so that whatever disturbs the machine disturbs all of them.

    Every session gets the same tokens. The first calls of each measurement do not count. Where there are several, each
    turn begins when the threads of the one before are at rest.

    Raises:
        UsageError: as `Plan.check`.
    """
    plan.check(sessions)
    random = np.random.default_rng(plan.seed)
    vocab = min(session.bundle.model.vocab_size for session in sessions)
    ids = random.integers(0, vocab, max(plan.prompt, *plan.depths, 1)).tolist()
    turns = [_Turn(session) for session in sessions]
    with progress.stage("Prefill", 1 + plan.repetitions):
        for repetition in range(1 + plan.repetitions):
            for turn in turns:
                if len(turns) > 1:
                    _rest()
                turn.call(partial(turn.session.prefill, ids[: plan.prompt]), counts=repetition > 0)
            progress.advance()
    for turn in turns:
        turn.look()
        turn.prefill.append(turn.point(plan.prompt, plan.prompt))
    for depth in plan.depths:
        with progress.stage(f"Decode at {depth}", _WARM + plan.steps):
            for turn in turns:
                if depth:
                    turn.session.prefill(ids[:depth])
                else:
                    turn.session.reset()
            for step in range(_WARM + plan.steps):
                for turn in turns:
                    if len(turns) > 1:
                        _rest()
                    turn.call(partial(turn.session.step, [ids[step % len(ids)]]), counts=step >= _WARM)
                progress.advance()
        for turn in turns:
            turn.look()
            turn.decode.append(turn.point(depth, 1))
    return [turn.result() for turn in turns]


def _rest() -> None:
    """Wait until no thread of this process works, two seconds at most. ONNX Runtime's wait for the next call by spinning
    for some hundredths of a second, and would take the processor from another session's (its steps took twice as long)."""
    for _ in range(_LOOKS):
        before = time.process_time()
        time.sleep(_LOOK)
        if time.process_time() - before < _AT_REST:
            return


def ratios(one: Result, other: Result) -> list[dict[str, Any]]:
    """How many times as long `other` takes, call by call: median and quartiles, for each prefill and each depth."""
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
