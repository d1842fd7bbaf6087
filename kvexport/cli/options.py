"""What verbs share: progress bars on a terminal's stderr and silence elsewhere, and the option that says what runs a bundle."""

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
    help="What runs the bundle: ONNX Runtime on the CPU or on CUDA, or the bundle's TensorRT engine; "
    "auto: an engine if one fits this machine, else CUDA, else the CPU.",
)


class BarProgress(Progress):
    """Draws a bar for each stage while it lasts; says notes on stderr."""

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
    from kvexport.cli.report import PlainConsole

    shown = BarProgress(PlainConsole(stderr=True), quiet)
    with shown._bars:
        yield shown
