"""Progress bars on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from kvexport.cli.report import PlainConsole
from kvexport.progress import PlannedTime, Progress


class BarProgress(Progress):
    """Draws one bar: for the whole plan, named after the current stage, or for a stage if there is no plan.

    Messages go to stderr unless quiet.
    """

    def __init__(self, console: PlainConsole, quiet: bool) -> None:
        self._console, self._quiet = console, quiet
        columns = (TextColumn("{task.description:<28}"), BarColumn(), _StepsColumn(), _TimeColumn())
        self.bars = Bars(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)
        self._task = self.bars.add_task("", visible=False)
        self._stages = 0  # open stages
        self._planned: PlannedTime | None = None

    def plan(self, parts: Mapping[str, float]) -> None:
        self._planned = PlannedTime(parts)
        self._whole = self.bars.add_task("", total=1.0, planned=self._planned, steps="")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if self._planned is None:
            yield
            return
        self._planned.begin(name)
        try:
            yield
        finally:
            self._planned.end()
            self._draw()

    @contextmanager
    def stage(self, name: str, steps: int) -> Iterator[None]:
        task = self.bars.add_task(name, total=steps or None, visible=self._planned is None)
        outer, self._task = self._task, task
        self._stages += 1
        if self._planned is not None and self._stages == 1:
            self._planned.begin_stage()
        self._draw()
        try:
            yield
        finally:
            self._stages -= 1
            self.bars.remove_task(task)
            self._task = outer

    def advance(self) -> None:
        self.bars.advance(self._task)
        self._draw()

    def note(self, text: str) -> None:
        if not self._quiet:
            self._console.print_line(f"kvexport: {text}")

    def _draw(self) -> None:
        """Bring the bar of the plan up to date."""
        if self._planned is None:
            return
        task = next(each for each in self.bars.tasks if each.id == self._task)
        if self._stages == 1 and task.total:  # a stage inside another one is a part of its steps
            self._planned.step(task.completed / task.total)
        steps = f"{task.completed:.0f}/{task.total:.0f}" if task.total else ""
        self.bars.update(self._whole, description=task.description, completed=self._planned.done, steps=steps)


class _StepsColumn(MofNCompleteColumn):
    """Steps of the current stage."""

    def render(self, task: Task) -> Text:
        if "planned" in task.fields:
            return Text(task.fields["steps"], style="progress.download")
        return super().render(task)


class _TimeColumn(ProgressColumn):
    """Time that is left of a plan; time that a stage has taken."""

    max_refresh = 0.5

    def __init__(self) -> None:
        super().__init__()
        self._elapsed = TimeElapsedColumn()

    def render(self, task: Task) -> Text:
        if "planned" not in task.fields:
            return self._elapsed.render(task)
        seconds = task.fields["planned"].seconds_left()
        text = "" if seconds is None else f"{timedelta(seconds=round(seconds))} left"
        return Text(text, style="progress.remaining")
