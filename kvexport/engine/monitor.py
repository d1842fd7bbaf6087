"""TensorRT's progress as ours, and our Ctrl-C as its cancellation; knows nothing of what is built."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from kvexport.progress import Progress

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class BuildMonitor:
    """One build that shows its progress and can be stopped between two of TensorRT's steps."""

    def __init__(self, trt: Any, progress: Progress) -> None:
        self.monitor = _monitor(trt, self)
        self.cancelled = threading.Event()
        self._progress = progress
        self._phases: list[
            tuple[str, bool, ExitStack]
        ] = []  # from the whole build inwards; whether it is shown
        self._lock = threading.Lock()

    def run(self, work: Any) -> Any:
        """What `work()` returns. It runs in another thread, so that this one hears Ctrl-C while TensorRT does not.

        Raises:
            KeyboardInterrupt: once the build has stopped.
        """
        done: list[Any] = []
        failed: list[BaseException] = []
        ended = threading.Event()

        def target() -> None:
            try:
                done.append(work())
            except BaseException as error:
                failed.append(error)
            finally:
                ended.set()

        interrupted = threading.Event()

        def interrupt(number: int, frame: Any) -> None:
            interrupted.set()
            self.cancelled.set()

        with _handled_by(interrupt):
            before = signal.pthread_sigmask(
                signal.SIG_BLOCK, _INTERRUPTS
            )  # the new thread and TensorRT's never hear them
            threading.Thread(target=target, name="engine build", daemon=True).start()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            ended.wait()
        self._close(0)
        if interrupted.is_set():
            raise KeyboardInterrupt
        if failed:
            raise failed[0]
        return done[0]

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            if self._phases and parent != self._phases[-1][0]:
                return  # of another of TensorRT's threads
            stack, shown = ExitStack(), steps > 1
            stack.enter_context(self._progress.stage(name, steps) if shown else nullcontext())
            self._phases.append((name, shown, stack))

    def step(self, name: str) -> bool:
        """Whether the build shall go on."""
        with self._lock:
            if self._phases and self._phases[-1][:2] == (name, True):
                self._progress.advance()
        return not self.cancelled.is_set()

    def finish(self, name: str) -> None:
        names = [phase[0] for phase in self._phases]
        if name in names:
            self._close(len(names) - 1 - names[::-1].index(name))

    def _close(self, depth: int) -> None:
        """Leave all phases from that depth on."""
        with self._lock:
            while len(self._phases) > depth:
                self._phases.pop()[2].close()


@contextmanager
def _handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Interrupts call `handler`, which unlike KeyboardInterrupt cannot break what it interrupts; ignored ones stay so."""
    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
        yield
        return
    before = {number: signal.getsignal(number) for number in _INTERRUPTS}
    before = {number: known for number, known in before.items() if known not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known)


def _monitor(trt: Any, watch: BuildMonitor) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """TensorRT cannot take an exception from here: one that progress raises stops the build."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self._safely(watch.start, name, parent, steps)

        def step_complete(self, name: str, step: int) -> bool:
            return bool(self._safely(watch.step, name))

        def phase_finish(self, name: str) -> None:
            self._safely(watch.finish, name)

        def _safely(self, call: Any, *arguments: Any) -> Any:
            try:
                return call(*arguments)
            except Exception:
                watch.cancelled.set()
                return False

    return Monitor()
