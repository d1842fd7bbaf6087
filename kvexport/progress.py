"""What long work tells about itself: stages, and steps within them. Says nothing of how that is shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """The silent one; the command line has one that draws bars on a terminal's stderr."""

    @contextmanager
    def stage(self, name: str, steps: int) -> Iterator[None]:
        """A stage of work, with the number of times that `advance` will be called inside it."""
        yield

    def advance(self) -> None:
        """One step of the current stage is done."""

    def note(self, text: str) -> None:
        """A sentence that the user should read."""
