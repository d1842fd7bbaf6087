"""Exceptions that a user can act on, their text, and the exit code of each."""

from __future__ import annotations


def error_text(problem: str, *, got: object = None, expected: object = None, fix: str | None = None) -> str:
    """Format an error: the problem on the first line, then one labelled entry for each value that is given.

    Further lines of a value are indented to where its first line begins.
    """
    labels = (("got:", got), ("expected:", expected), ("fix:", fix))
    entries = (f"  {label:<9} {value}" for label, value in labels if value is not None)
    return "\n".join([problem, *(entry.replace("\n", f"\n{'':<12}") for entry in entries)])


def reason_of(error: Exception) -> str:
    """Reason of an exception; of an OSError without its number and path, which the message names anyway."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


class KvexportError(Exception):
    """A failure that the user can act on.

    The message has up to four lines: what must be true (and where), the value that was got, the values that
    are allowed, and the command or option that fixes it. The command line prints the message without a
    traceback and exits with `exit_code`.

    Attributes:
        what: the first line.
        got: the rejected value; None if the message has none.
        expected: the values that are allowed; None if the message has none.
        fix: how to fix it; None if the message has none.
    """

    exit_code = 2

    def __init__(
        self, what: str, *, got: object = None, expected: object = None, fix: str | None = None
    ) -> None:
        self.what, self.got, self.expected, self.fix = what, got, expected, fix
        super().__init__(error_text(what, got=got, expected=expected, fix=fix))


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
