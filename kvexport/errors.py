"""Errors raised on purpose, and the exit code of each."""

from __future__ import annotations


class KvexportError(Exception):
    """A failure that the user can act on.

    The message has up to four lines: what must be (and where), what was got, what was expected, and the command or
    option that fixes it. The command line prints the message without a traceback and exits with `exit_code`.

    Attributes:
        what: the first line.
        got: the value that was found; None if the message has none.
        expected: the values that are allowed; None if the message has none.
        fix: how to fix it; None if the message has none.
    """

    exit_code = 2

    def __init__(
        self, what: str, *, got: object = None, expected: object = None, fix: str | None = None
    ) -> None:
        self.what, self.got, self.expected, self.fix = what, got, expected, fix
        labelled = (("got:", got), ("expected:", expected), ("fix:", fix))
        super().__init__(
            "\n".join([what, *(f"  {label:<9} {text}" for label, text in labelled if text is not None)])
        )


class GateFailed(KvexportError):
    """A measured value exceeds its gate."""

    exit_code = 1


class UsageError(KvexportError):
    """An option, an argument or an input file is invalid."""

    exit_code = 2


class CheckpointError(UsageError):
    """The checkpoint is not a readable decoder of a supported family."""


class BundleError(UsageError):
    """The bundle is damaged, incomplete, or of an unsupported format version."""


class CannotRunHere(KvexportError):
    """This machine lacks the memory, disk space, package or hardware that the request needs."""

    exit_code = 3
