"""Progress of a long operation: stages, steps within a stage, and messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Reports nothing. The command line has a subclass that draws bars on a terminal's stderr."""

    @contextmanager
    def stage(self, name: str, steps: int) -> Iterator[None]:
        """Begin a stage in which `advance` is called `steps` times; 0: the number is not known."""
        yield

    def advance(self) -> None:
        """Report one step of the current stage as done."""

    def note(self, text: str) -> None:
        """Report a message that the user should read."""
