"""What verbs share in showing their work: progress bars on a terminal's stderr, and silence elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from kvexport.cli.report import PlainConsole
from kvexport.progress import Progress


class BarProgress(Progress):
    """Draws a bar for each stage while it lasts; says notes on stderr."""

    def __init__(self, console: PlainConsole, quiet: bool) -> None:
        self._console, self._quiet = console, quiet
        columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Bars(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)
        self._task = self._bars.add_task("", visible=False)

    @contextmanager
    def stage(self, name: str, steps: int) -> Iterator[None]:
        outer, self._task = self._task, self._bars.add_task(name, total=steps or None)
        try:
            yield
        finally:
            self._bars.remove_task(self._task)
            self._task = outer

    def advance(self) -> None:
        self._bars.advance(self._task)

    def note(self, text: str) -> None:
        if not self._quiet:
            self._console.say(f"kvexport: {text}")


@contextmanager
def progress_bar(quiet: bool) -> Iterator[BarProgress]:
    """Progress of one command."""
    shown = BarProgress(PlainConsole(stderr=True), quiet)
    with shown._bars:
        yield shown
