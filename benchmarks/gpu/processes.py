"""Run a process with a time limit, in a session of its own; end it with all its children, and keep its last
lines."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_LAST = 40  # lines of the log that are kept
_GRACE = 5.0  # seconds between asking to end and ending
_LOOK = 0.05


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        exit_code: its own; negative: the signal that ended it.
        timed_out: it was ended, at its limit or because the run was interrupted.
        last_words: the end of what it wrote to stdout and stderr.
    """

    exit_code: int
    timed_out: bool
    seconds: float
    last_words: list[str]


def run_limited(
    command: Sequence[str],
    limit: float,
    log: Path,
    environment: Mapping[str, str],
    stop: threading.Event | None = None,
) -> Ended:
    """Run `command` for `limit` seconds at most, or until `stop`; what it writes goes to the file `log`."""
    begin = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
        try:
            in_time = _ends(process, begin + limit, stop)
        finally:
            _end(process)
    words = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return Ended(process.returncode, not in_time, round(time.monotonic() - begin, 1), words[-_LAST:])


def _ends(process: subprocess.Popen[bytes], until: float, stop: threading.Event | None = None) -> bool:
    """Whether it ends by itself before then. It is not reaped, so that its number cannot become another's."""
    while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if time.monotonic() > until or (stop is not None and stop.is_set()):
            return False
        time.sleep(_LOOK)
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process, if it still runs, and everything that it left in its session."""
    if not _ends(process, 0.0):
        os.killpg(process.pid, signal.SIGTERM)
        _ends(process, time.monotonic() + _GRACE)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
