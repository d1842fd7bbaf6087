"""Run the command line in this process."""

from __future__ import annotations

import io
import signal
from contextlib import redirect_stderr, redirect_stdout

from kvexport.cli import main
from kvexport.runtime.backends.select import warn_once

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Ended = tuple[object, str, str]  # exit code, standard output, standard error


def run_kvexport(*arguments: object) -> Ended:
    """Run `kvexport ARGUMENTS`; the handlers that it sets for signals are removed again."""
    code: object = 0
    warn_once.cache_clear()
    handlers = [signal.getsignal(number) for number in _SIGNALS]
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="", errors="backslashreplace")
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main([str(argument) for argument in arguments])
    except SystemExit as ended:
        code = ended.code
    finally:
        for number, handler in zip(_SIGNALS, handlers, strict=True):
            signal.signal(number, handler)
    return code, _text(out), _text(err)


def _text(file: io.TextIOWrapper) -> str:
    file.flush()
    buffer = file.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode()
