"""Options and progress bars that several commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from kvexport.progress import Progress

if TYPE_CHECKING:
    from kvexport.cli.report import PlainConsole

provider_option = click.option(
    "--provider",
    type=click.Choice(("auto", "cpu", "cuda", "tensorrt")),
    default="auto",
    show_default=True,
    help="Execution provider: cpu and cuda use ONNX Runtime, tensorrt uses an engine of the bundle; "
    "auto takes an engine that fits this machine, else CUDA, else the CPU.",
)
device_option = click.option(
    "--device",
    metavar="auto|cpu|cuda|cuda:N",
    default="auto",
    show_default=True,
    help="Device on which PyTorch computes: cpu, cuda (an NVIDIA GPU), or cuda:N for the GPU with index N; "
    "auto takes cuda if PyTorch can use it, else cpu.",
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    help="Number of CPU threads for one operator.  [default: one per core]",
)


class BarProgress(Progress):
    """Draws one bar per stage on a terminal, and prints messages to stderr unless quiet."""

    def __init__(self, console: PlainConsole, quiet: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self._console, self._quiet = console, quiet
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self.bars = Bars(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)
        self._task = self.bars.add_task("", visible=False)

    @contextmanager
    def stage(self, name: str, steps: int) -> Iterator[None]:
        outer, self._task = self._task, self.bars.add_task(name, total=steps or None)
        try:
            yield
        finally:
            self.bars.remove_task(self._task)
            self._task = outer

    def advance(self) -> None:
        self.bars.advance(self._task)

    def note(self, text: str) -> None:
        if not self._quiet:
            self._console.print_line(f"kvexport: {text}")


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Progress]:
    """Show the progress of one command, or pass it on to the `Progress` that `main` was given."""
    from kvexport.cli.report import PlainConsole

    context = click.get_current_context(silent=True)
    given = None if context is None else context.find_object(Progress)
    if given is not None:
        yield given
        return
    progress = BarProgress(PlainConsole(stderr=True), quiet)
    with progress.bars:
        yield progress
