"""Report TensorRT's build progress, and cancel the build on Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from kvexport.progress import Progress

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class BuildMonitor:
    """Run one build, report its progress, and stop it on an interrupt between two of TensorRT's steps.

    Attributes:
        monitor: the trt.IProgressMonitor of the build.
        cancelled: set when the build must stop.
    """

    def __init__(self, trt: Any, progress: Progress) -> None:
        self.monitor = _monitor(trt, self)
        self.cancelled = threading.Event()
        self._progress = progress
        self._phases: list[tuple[str, bool, ExitStack]] = []  # outermost first: name, whether it is shown
        self._lock = threading.Lock()

    def run(self, work: Any) -> Any:
        """Call `work` in another thread, so that this thread can handle Ctrl-C while TensorRT builds.

        Returns:
            the result of `work`.

        Raises:
            KeyboardInterrupt: the build was interrupted; it has stopped.
            BaseException: what `work` raises.
        """
        results: list[Any] = []
        errors: list[BaseException] = []
        ended = threading.Event()

        def target() -> None:
            try:
                results.append(work())
            except BaseException as error:
                errors.append(error)
            finally:
                ended.set()

        interrupted = threading.Event()

        def interrupt(number: int, frame: Any) -> None:
            interrupted.set()
            self.cancelled.set()

        with _handle_interrupts(interrupt):
            # The new thread and TensorRT's own threads inherit the blocked signals.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
            threading.Thread(target=target, name="engine build", daemon=True).start()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            ended.wait()
        self._close(0)
        if interrupted.is_set():
            raise KeyboardInterrupt
        if errors:
            raise errors[0]
        return results[0]

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Begin a phase of the build; a phase of one step is not shown."""
        with self._lock:
            if self._phases and parent != self._phases[-1][0]:
                return  # a phase of another of TensorRT's threads
            stack, shown = ExitStack(), steps > 1
            stack.enter_context(self._progress.stage(name, steps) if shown else nullcontext())
            self._phases.append((name, shown, stack))

    def step(self, name: str) -> bool:
        """Report a finished step; returns whether the build may continue."""
        with self._lock:
            if self._phases and self._phases[-1][:2] == (name, True):
                self._progress.advance()
        return not self.cancelled.is_set()

    def finish(self, name: str) -> None:
        """End a phase, and the phases inside it."""
        names = [phase[0] for phase in self._phases]
        if name in names:
            self._close(len(names) - 1 - names[::-1].index(name))

    def _close(self, depth: int) -> None:
        """End all phases from this depth on."""
        with self._lock:
            while len(self._phases) > depth:
                self._phases.pop()[2].close()


@contextmanager
def _handle_interrupts(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Call `handler` on interrupts instead of raising KeyboardInterrupt; ignored signals stay ignored."""
    if threading.current_thread() is not threading.main_thread():  # signal handlers run only there
        yield
        return
    before = {number: signal.getsignal(number) for number in _INTERRUPTS}
    before = {number: old for number, old in before.items() if old not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _monitor(trt: Any, build: BuildMonitor) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Pass TensorRT's events on. An exception must not reach TensorRT: it stops the build instead."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self._safely(build.start, name, parent, steps)

        def step_complete(self, name: str, step: int) -> bool:
            return bool(self._safely(build.step, name))

        def phase_finish(self, name: str) -> None:
            self._safely(build.finish, name)

        def _safely(self, call: Any, *arguments: Any) -> Any:
            try:
                return call(*arguments)
            except Exception:
                build.cancelled.set()
                return False

    return Monitor()
