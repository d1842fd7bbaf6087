"""The command line: verbs by name, each loaded when it is used, and one place that turns errors into exit codes."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from importlib import import_module
from types import FrameType
from typing import Any

import click

from kvexport.errors import KvexportError
from kvexport.version import __version__

# What `kvexport --help` says of each verb, so that it need not be imported to say it.
_VERBS = {
    "build": "Turn a checkpoint into a proved bundle with fewer KV heads.",
    "run": "Generate text from a bundle.",
    "inspect": "Show what a bundle holds, and check its hashes.",
    "validate": "Prove a bundle against its PyTorch twin.",
    "self-test": "Say whether a bundle computes here what it computed when it was built.",
    "evaluate": "Measure what compression cost, on a text.",
    "compress": "Turn a checkpoint into a standard one with fewer KV heads.",
    "calibrate": "Save calibration statistics for several builds.",
    "analyze": "Show what a cache is like, and what a conversion does to it, as a page.",
    "plan": "Say from config.json alone what fits a target, and how fast it will be.",
    "lint": "Name what a target's engine cannot import, before building there.",
    "engine": "Build a TensorRT engine of a bundle.",
    "bench": "Measure prefill, decode and memory of a bundle.",
    "targets": "List the devices that kvexport knows.",
    "doctor": "Say what is installed, and what is missing for which target.",
}


class _ReaderGone(Exception):
    """Standard output was closed at its other end."""


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        command: click.Command = import_module(f"kvexport.cli.{cmd_name.replace('-', '_')}").command
        command.name = cmd_name
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:  # click would exit with 1, which is a failed gate's code
            raise _ReaderGone from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(_VERBS.items()))


@click.command(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="kvexport %(version)s")
def verbs() -> None:
    """Trained decoders with fewer KV heads, as ONNX that runs on the edge, proved against PyTorch."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 ok, 1 a gate failed, 2 usage, 3 this environment can't, 130 interrupted.

    141 where the reader of standard output has gone, as for a program that SIGPIPE ends.
    """
    signalled = _Signalled()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # so that what was begun is cleaned up
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, signalled)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character gets ? for it
    try:
        try:
            verbs.main(arguments, prog_name="kvexport", standalone_mode=False)
        except Exception as error:
            if (
                signalled.any
            ):  # native code on the stack may have turned KeyboardInterrupt into an error of its own
                raise KeyboardInterrupt from error
            raise
    except KvexportError as error:
        _fail(str(error), error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except _ReaderGone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit
        sys.exit(141)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("kvexport"):  # a mistake of ours, which no package mends
            raise
        _fail(_missing(error), 3)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(
            error
        ):  # torch's own way to say it
            raise
        _fail(
            "out of memory\n  fix:      use fewer --samples, a shorter --length, or a machine with more memory",
            3,
        )
    except OSError as error:
        _fail(_refused(error), 3)


class _Signalled:
    """Takes signals as Python takes SIGINT, and remembers that one came."""

    any = False

    def __call__(self, number: int, frame: FrameType | None) -> Any:
        self.any = True
        raise KeyboardInterrupt


def _refused(error: OSError) -> str:
    """What the operating system refused, and what may help."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full ({error.strerror})\n  fix:      free space, or write to another disk"
    where = error.filename or error.filename2
    remedy = (
        "\n  fix:      make it writable, or write elsewhere"
        if error.errno in (errno.EROFS, errno.EACCES)
        else ""
    )
    return f"{error.strerror or error}" + (f": {where}" if where else "") + remedy


# What brings a package that may be missing: kvexport itself, or one of its extras. All others are what `convert` brings.
_BASE = ("numpy", "click", "rich", "tokenizers", "tomli")
_EXTRAS = {
    "onnxruntime": "cpu",
    "cuda": "gpu",
    "tensorrt": "tensorrt",
    "polygraphy": "tensorrt",
    "tensorrt_rtx": "rtx",
    "peft": "heal",
}


def _missing(error: ModuleNotFoundError) -> str:
    name = str(error.name).partition(".")[0]
    wanted = "kvexport" if name in _BASE else f"'kvexport[{_EXTRAS.get(name, 'convert')}]'"
    return f"the package {name} is not installed\n  fix:      pip install {wanted}"


def _fail(message: str, code: int) -> None:
    click.echo(f"kvexport: {message}", err=True)
    sys.exit(code)
