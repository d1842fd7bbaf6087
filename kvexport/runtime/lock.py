"""The lock of a session: one call at a time, and none after the session was closed."""

from __future__ import annotations

from threading import RLock
from types import TracebackType

from kvexport.errors import UsageError


class SessionLock:
    """A reentrant lock that refuses entry after `close`.

    Attributes:
        closed: whether the session was closed.
    """

    def __init__(self) -> None:
        self.lock, self.closed = RLock(), False

    def __enter__(self) -> None:
        """
        Raises:
            UsageError: the session is closed.
        """
        self.lock.acquire()
        if self.closed:
            self.lock.release()
            raise UsageError("the session is closed", fix="open the bundle again: kvexport.open(BUNDLE)")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lock.release()
