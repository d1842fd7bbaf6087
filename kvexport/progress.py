"""Progress of a long operation: a plan of its parts, stages, steps within a stage, and messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


class Progress:
    """Reports nothing. The command line has a subclass that draws bars on a terminal's stderr."""

    def plan(self, parts: Mapping[str, float]) -> None:
        """Announce the parts that are left of an operation, with their expected times in any common unit."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Begin a part of the plan; the stages inside belong to it. Without a plan it means nothing."""
        yield

    @contextmanager
    def stage(self, name: str, steps: int) -> Iterator[None]:
        """Begin a stage in which `advance` is called `steps` times; 0: the number is not known."""
        yield

    def advance(self) -> None:
        """Report one step of the current stage as done."""

    def note(self, text: str) -> None:
        """Report a message that the user should read."""


class PlannedTime:
    """The share of a plan that is done, and the time that is left.

    The expected times only have to be right relative to each other: the seconds of a unit are measured from
    what is done, again with every step.
    """

    def __init__(self, parts: Mapping[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            parts: expected time of each part, in a common unit.
            clock: the time in seconds.
        """
        self._left, self._clock = dict(parts), clock
        self._total, self._finished = sum(parts.values()), 0.0
        self._part: str | None = None
        # stages of the part that have begun, all but the last of them ended, and the share of the last
        self._stages, self._share = 0, 0.0
        self._start = self._measured = clock()

    def begin(self, part: str) -> None:
        """Begin a part; one that is not in the plan counts nothing."""
        self._part, self._stages, self._share = part, 0, 0.0

    def begin_stage(self) -> None:
        """Begin a stage of the part. The number of its stages is known only when it ends."""
        self._stages, self._share = self._stages + 1, 0.0
        self._measured = self._clock()

    def step(self, share: float) -> None:
        """Report the share of the current stage that is done, 0 to 1."""
        self._share, self._measured = share, self._clock()

    def end(self) -> None:
        """End the current part."""
        if self._part is not None:
            self._finished += self._left.pop(self._part, 0.0)
        self._part, self._measured = None, self._clock()

    @property
    def done(self) -> float:
        """Share of the plan that is done, 0 to 1."""
        return min(1.0, self._units() / self._total) if self._total else 1.0

    def seconds_left(self) -> float | None:
        """Time that is left; None while nothing is done."""
        units = self._units()
        if not units:
            return None
        left = (self._measured - self._start) / units * (self._total - units)
        return max(0.0, left - (self._clock() - self._measured))

    def _units(self) -> float:
        """Expected time of what is done."""
        if self._part is None or not self._stages:
            return self._finished
        share = (self._stages - 1 + self._share) / self._stages
        return self._finished + self._left.get(self._part, 0.0) * share
