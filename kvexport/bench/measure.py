"""Times of prefill and decode of one bundle, or of two that take turns in one process.

Knows sessions and clocks; must not know what a machine tells of itself, nor how results are shown.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kvexport.errors import UsageError
from kvexport.progress import Progress
from kvexport.runtime.session import Session

_WARM = 3  # calls before those that count
_PROMPT, _USUAL = 512, (0, 512, 4096)


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        prompt: tokens of a prefill; decode is measured apart.
        depths: tokens in the cache when decoding begins, one measurement each.
        steps: tokens decoded at each depth, one by one; the cache grows by as many.
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
        return cls(prompt or min(_PROMPT, room), tuple(fitting if depths is None else depths), steps, repetitions, seed)

    def check(self, sessions: Sequence[Session]) -> None:
        """Refuse what does not fit.

        Raises:
            UsageError: a prompt or a depth is beyond a session's capacity.
        """
        for session in sessions:
            for what, tokens in (("-p", self.prompt), *(("-d", depth + _WARM + self.steps) for depth in self.depths)):
                if tokens > session.capacity:
                    raise UsageError(
                        f"{what} asks for more tokens than {session.bundle.path} has room for", seen=tokens,
                        allowed=f"{session.capacity}, of which {self.steps} + {_WARM} are for the steps",
                        fix="choose a smaller depth, or build the bundle again with a larger --capacity",
                    )  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        depth: tokens in the cache when decoding began; of a prefill, its tokens.
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
        kv_bytes_planned: of the deepest point, all its tokens, as the bundle's shapes say.
        kv_bytes_allocated: what the session holds there.
        device: what is known of the device's memory; None on the CPU.
    """

    provider: str
    prefill: tuple[Point, ...]
    decode: tuple[Point, ...]
    kv_bytes_planned: int
    kv_bytes_allocated: int
    device: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def measure(sessions: Sequence[Session], plan: Plan, progress: Progress) -> list[Result]:
    """Measure sessions that take turns, call by call, so that whatever disturbs the machine disturbs all of them.

    Every session gets the same tokens. The first calls of each measurement do not count.

    Raises:
        UsageError: as `Plan.check`.
    """
    plan.check(sessions)
    random = np.random.default_rng(plan.seed)
    vocab = min(session.bundle.model.vocab_size for session in sessions)
    ids = random.integers(0, vocab, max(plan.prompt, *plan.depths, 1)).tolist()
    prefill: list[list[float]] = [[] for _ in sessions]
    with progress.stage("Prefill", 1 + plan.repetitions):
        for repetition in range(1 + plan.repetitions):
            for session, times in zip(sessions, prefill, strict=True):
                begin = time.perf_counter()
                session.prefill(ids[: plan.prompt])
                if repetition:
                    times.append(time.perf_counter() - begin)
            progress.advance()
    decode: list[list[Point]] = [[] for _ in sessions]
    for depth in plan.depths:
        with progress.stage(f"Decode at {depth}", _WARM + plan.steps):
            for session in sessions:
                if depth:
                    session.prefill(ids[:depth])
                else:
                    session.reset()
            taken: list[list[float]] = [[] for _ in sessions]
            for step in range(_WARM + plan.steps):
                token = [ids[step % len(ids)]]
                for session, times in zip(sessions, taken, strict=True):
                    begin = time.perf_counter()
                    session.step(token)
                    if step >= _WARM:
                        times.append(time.perf_counter() - begin)
                progress.advance()
        for points, times in zip(decode, taken, strict=True):
            points.append(_point(depth, 1, times))
    return [
        _result(session, _point(plan.prompt, plan.prompt, times), points)
        for session, times, points in zip(sessions, prefill, decode, strict=True)
    ]


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
    return Point(depth, tokens, round(p50, 4), round(p90, 4), round(p99, 4), round(1000 * tokens / p50, 2), samples)


def _result(session: Session, prefill: Point, decode: Sequence[Point]) -> Result:
    memory = session.memory()
    return Result(
        provider=session.provider,
        prefill=(prefill,),
        decode=tuple(decode),
        kv_bytes_planned=int(session.lengths.sum()) * memory.bytes_per_token,
        kv_bytes_allocated=memory.bytes_allocated,
        device=None if memory.device is None else asdict(memory.device),
    )
