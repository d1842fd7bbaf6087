"""The stages of a build that are finished."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from kvexport.progress import Progress


class Stages:
    """Measures the wall time of each stage.

    Attributes:
        seconds: wall time of each computed stage, in seconds.
        reused: stages whose saved results were used.
    """

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self.reused: list[str] = []
        self._progress = progress

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Measure the wall time of a stage, which is a part of the plan of the progress."""
        start = time.perf_counter()
        with self._progress.part(stage):
            yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)
