"""Progress of a build, also from several threads; an interrupt stops the build and waits for it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from kvexport.engine.monitor import BuildMonitor
from kvexport.progress import Progress

TRT = SimpleNamespace(IProgressMonitor=object)


class EventRecorder(Progress):
    """Record the events in order."""

    def __init__(self) -> None:
        self.events: list[str] = []

    @contextmanager
    def stage(self, name: str, steps: int) -> Iterator[None]:
        self.events.append(f"{name} of {steps}")
        yield
        self.events.append(f"/{name}")

    def advance(self) -> None:
        self.events.append("step")


def test_phases_nest_and_other_threads_are_ignored() -> None:
    recorder = EventRecorder()
    watch = BuildMonitor(TRT, recorder)

    def work() -> str:
        monitor = watch.monitor
        monitor.phase_start("build", None, 2)
        monitor.phase_start("one step", "build", 1)
        monitor.phase_start("tactics", "one step", 3)
        monitor.phase_start("elsewhere", "another", 5)
        assert monitor.step_complete("elsewhere", 0)
        assert monitor.step_complete("tactics", 0)
        monitor.phase_finish("elsewhere")
        monitor.phase_finish("one step")  # with what is inside it
        assert monitor.step_complete("build", 0)
        return "plan"

    assert watch.run(work) == "plan"
    assert recorder.events == ["build of 2", "tactics of 3", "step", "/tactics", "step", "/build"]


def test_an_error_of_the_build_is_raised() -> None:
    watch = BuildMonitor(TRT, Progress())

    def work() -> None:
        raise ValueError("from the other thread")

    with pytest.raises(ValueError, match="from the other thread"):
        watch.run(work)


def test_a_progress_error_stops_the_build() -> None:
    class Broken(Progress):
        def advance(self) -> None:
            raise OSError("the terminal has gone")

    watch = BuildMonitor(TRT, Broken())

    def work() -> bool:
        watch.monitor.phase_start("build", None, 2)
        return bool(watch.monitor.step_complete("build", 0))

    assert watch.run(work) is False


def test_an_interrupt_is_raised_after_the_build_has_stopped() -> None:
    watch = BuildMonitor(TRT, Progress())
    stopped = threading.Event()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])

    def work() -> None:
        watch.monitor.phase_start("build", None, 2)
        os.kill(os.getpid(), signal.SIGINT)
        while watch.monitor.step_complete("build", 0):
            pass
        os.kill(os.getpid(), signal.SIGINT)  # impatience changes nothing
        stopped.set()

    with pytest.raises(KeyboardInterrupt):
        watch.run(work)
    assert stopped.is_set()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
