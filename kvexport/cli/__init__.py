"""The command line: commands by name, each imported when it is used, and the exit code of every error."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from kvexport.errors import CannotRunHere, KvexportError
from kvexport.packages import install_command, package_of
from kvexport.version import __version__

if TYPE_CHECKING:
    from kvexport.progress import Progress

# Written here, and not taken from the commands' modules, so that `kvexport --help` imports none of them.
_COMMANDS = {
    "build": "Compress a checkpoint and export it to a validated bundle.",
    "run": "Generate text with a bundle.",
    "inspect": "Show the layers, sizes and files of a bundle.",
    "validate": "Compare a bundle's outputs with its PyTorch reference.",
    "self-test": "Check that a bundle computes its recorded outputs on this machine.",
    "evaluate": "Measure the loss from compression on a text.",
    "compress": "Convert a checkpoint to a Hugging Face checkpoint with fewer KV heads.",
    "calibrate": "Save calibration statistics for use in several builds.",
    "analyze": "Write an HTML page on a model's KV cache and its compression.",
    "plan": "Predict memory use and speed on a target from config.json.",
    "lint": "List the nodes of a bundle that a target's TensorRT does not support.",
    "engine": "Build a TensorRT engine from a bundle.",
    "bench": "Measure prefill speed, decode speed and memory use of a bundle.",
    "cache": "List or remove the results that earlier builds kept.",
    "targets": "List the target devices and their specifications.",
    "doctor": "Show what is installed on this machine and what is missing.",
}
_EXIT_CODES = (
    "Exit codes: 0 success; 1 a validation or a limit failed; 2 invalid arguments or input files; "
    "3 not possible on this machine; 130 interrupted."
)


class _OutputClosed(Exception):
    """The reader of standard output closed it."""


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = import_module(f"kvexport.cli.{cmd_name.replace('-', '_')}").command
        command.name = cmd_name
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:  # click would exit with 1, which is the code of a failed gate
            raise _OutputClosed from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EXIT_CODES)
@click.version_option(__version__, message="kvexport %(version)s")
def commands() -> None:
    """Reduce the KV cache of trained decoders, export them to ONNX, and run them on edge devices."""


def main(
    arguments: list[str] | None = None,
    *,
    command: click.Command = commands,
    progress: Progress | None = None,
) -> None:
    """Run the command line; exits the process if it fails.

    Exit codes: 0 success, 1 a gate failed, 2 invalid arguments or input, 3 not possible on this machine, 130
    interrupted, 141 the reader of standard output closed it (as for a program that SIGPIPE ends).

    Args:
        arguments: default `sys.argv[1:]`.
        command: the command to run.
        progress: receives the command's progress, in place of bars on the terminal.
    """
    handler = _SignalHandler()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # unfinished output is then removed
        if signal.getsignal(number) is not signal.SIG_IGN:  # ignored under nohup
            signal.signal(number, handler)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # prints ? for characters that the terminal cannot show
    warnings = _WarningPrinter(logging.WARNING)
    logging.getLogger("kvexport").addHandler(warnings)
    try:
        try:
            command.main(arguments, prog_name="kvexport", standalone_mode=False, obj=progress)
        except Exception as error:
            if handler.received:  # native code can turn KeyboardInterrupt into an error of its own
                raise KeyboardInterrupt from error
            raise
    except (click.exceptions.Abort, KeyboardInterrupt):
        _exit_with("interrupted", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except _OutputClosed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # buffers are flushed at exit
        sys.exit(141)
    except Exception as error:
        known = _as_kvexport_error(error)
        if known is None:
            raise
        _exit_with(str(known), known.exit_code)
    finally:
        logging.getLogger("kvexport").removeHandler(warnings)


class _WarningPrinter(logging.Handler):
    """Prints the package's warnings to standard error, unless the command was given --quiet."""

    def emit(self, record: logging.LogRecord) -> None:
        context = click.get_current_context(silent=True)
        if context is None or not context.params.get("quiet"):
            click.echo(f"kvexport: {record.getMessage()}", err=True)


class _SignalHandler:
    """Raises KeyboardInterrupt, as Python does on SIGINT, and records that a signal was received."""

    received = False

    def __call__(self, number: int, frame: FrameType | None) -> Any:
        self.received = True
        raise KeyboardInterrupt


def _as_kvexport_error(error: Exception) -> KvexportError | None:
    """The error to show for an exception; None if the exception is a bug, whose traceback must be seen."""
    if isinstance(error, KvexportError):
        return error
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("kvexport"):
        return _missing_package(error)
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)  # torch raises RuntimeError
    ):
        fix = (
            "stop other programs, or use a machine with more memory; "
            "conversion needs less memory with fewer --samples or a shorter --length"
        )
        return CannotRunHere("this machine does not have enough memory", fix=fix)
    if isinstance(error, OSError):
        return _system_error(error)
    return None


def _system_error(error: OSError) -> CannotRunHere:
    path = error.filename or error.filename2
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        got = f"{reason}: {path}" if path else reason
        return CannotRunHere("the disk is full", got=got, fix="free space, or write to another disk")
    if not path:
        return CannotRunHere(f"the operating system reports an error: {reason}")
    denied = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
    fix = "change the permissions of the file or folder, or use another path" if denied else None
    return CannotRunHere(f"{path} cannot be read or written", got=reason, fix=fix)


def _missing_package(error: ModuleNotFoundError) -> CannotRunHere:
    module = str(error.name).partition(".")[0]
    package = package_of(module)
    # Modules that kvexport does not import itself are dependencies of torch and the other packages of
    # `convert`.
    fix = install_command("torch" if package is None else package.name)
    return CannotRunHere(f"the package {module} is not installed", fix=fix)


def _exit_with(message: str, code: int) -> NoReturn:
    click.echo(f"kvexport: {message}", err=True)
    sys.exit(code)
