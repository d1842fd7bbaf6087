"""The command line: verbs by name, each loaded when it is used, and one place that turns errors into exit codes."""

from __future__ import annotations

import errno
import signal
import sys
from importlib import import_module
from types import FrameType
from typing import Any

import click

from kvexport.errors import KvexportError

# What `kvexport --help` says of each verb, so that it need not be imported to say it.
_VERBS = {
    "build": "Turn a checkpoint into a proved bundle with fewer KV heads.",
    "run": "Generate text from a bundle.",
    "inspect": "Show what a bundle holds, and check its hashes.",
    "validate": "Prove a bundle against its PyTorch twin.",
    "evaluate": "Measure what compression cost, on a text.",
    "compress": "Turn a checkpoint into a standard one with fewer KV heads.",
    "calibrate": "Save calibration statistics for several builds.",
}


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        command: click.Command = import_module(f"kvexport.cli.{cmd_name}").command
        command.name = cmd_name
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(_VERBS.items()))


@click.command(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kvexport", message="kvexport %(version)s")
def verbs() -> None:
    """Trained decoders with fewer KV heads, as ONNX that runs on the edge, proved against PyTorch."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 ok, 1 a gate failed, 2 usage, 3 this environment can't, 130 interrupted."""
    signal.signal(signal.SIGTERM, _interrupt)  # so that what was begun is cleaned up
    try:
        verbs.main(arguments, prog_name="kvexport", standalone_mode=False)
    except KvexportError as error:
        _fail(str(error), error.exit_code)
    except click.exceptions.Abort:
        _fail("interrupted; nothing was left behind", 130)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was left behind", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; there is nobody to tell
        sys.exit(1)
    except ModuleNotFoundError as error:
        _fail(_missing(error), 3)
    except MemoryError:
        _fail("out of memory\n  fix:     use fewer --samples, a shorter --length, or a machine with more memory", 3)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        where = error.filename or "while writing the output"
        _fail(f"{error.strerror}: {where}\n  fix:     free space, or choose another --output", 3)


def _interrupt(number: int, frame: FrameType | None) -> Any:
    raise KeyboardInterrupt


def _missing(error: ModuleNotFoundError) -> str:
    extra = "cpu" if error.name == "onnxruntime" else "convert"
    return f"the package {error.name} is not installed\n  fix:     pip install 'kvexport[{extra}]'"


def _fail(message: str, code: int) -> None:
    click.echo(f"kvexport: {message}", err=True)
    sys.exit(code)
