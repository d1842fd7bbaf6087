"""The errors kvexport raises on purpose, and the exit code of each; knows nothing of what raises them."""

from __future__ import annotations


class KvexportError(Exception):
    """A failure with a cause that the user can act on.

    The message is made of what failed (and where), the value seen, the values allowed, and the command
    or option that fixes it; the command line prints it without a traceback and exits with `exit_code`.
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        seen: object = None,
        allowed: object = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.seen, self.allowed, self.fix = what, seen, allowed, fix
        lines = [what]
        if seen is not None:
            lines.append(f"  seen:    {seen}")
        if allowed is not None:
            lines.append(f"  allowed: {allowed}")
        if fix is not None:
            lines.append(f"  fix:     {fix}")
        super().__init__("\n".join(lines))


class GateFailed(KvexportError):
    """A measured value is outside its gate."""

    exit_code = 1


class UsageError(KvexportError):
    """An option, an argument or an input file that cannot be used."""

    exit_code = 2


class CheckpointError(UsageError):
    """The checkpoint cannot be read as a decoder of a known family."""


class BundleError(UsageError):
    """The bundle is damaged, incomplete, or of a format that this version does not read."""


class CannotRunHere(KvexportError):
    """This machine lacks the memory, disk, package or hardware for what was asked."""

    exit_code = 3
