"""Tests of the command line itself: imports, the list of commands, errors, exit codes and signals."""

from __future__ import annotations

import errno
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from kvexport import __version__
from kvexport.cli import main
from kvexport.errors import BundleError, CannotRunHere, CheckpointError, GateFailed, KvexportError, UsageError

COMMANDS = (
    "build",
    "run",
    "inspect",
    "validate",
    "self-test",
    "evaluate",
    "compress",
    "calibrate",
    "analyze",
    "plan",
    "lint",
    "engine",
    "bench",
    "cache",
    "targets",
    "doctor",
)
_HEAVY = (
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "safetensors",
    "tokenizers",
    "tensorrt_rtx",
    "polygraphy",
)

_HELP = """
import sys
from kvexport.cli import main
for arguments in {arguments}:
    try:
        main(arguments)
    except SystemExit as ended:
        assert not ended.code, (arguments, ended.code)
    imported = sorted(set({unwanted}) & set(sys.modules))
    assert not imported, (arguments, imported)
"""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Restore the signal handlers that `main` replaces."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def run_python(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)  # type: ignore[call-overload]


def exit_code(arguments: list[str], **options: click.Command) -> object:
    """Run a command line that must fail, and return its exit code."""
    with pytest.raises(SystemExit) as ended:
        main(arguments, **options)
    return ended.value.code


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        ([["--help"], ["-h"], ["--version"]], (*_HEAVY, "numpy", "rich")),
        ([[command, "--help"] for command in COMMANDS], _HEAVY),
    ],
    ids=["kvexport", "commands"],
)
def test_help_imports_nothing_heavy(arguments: list[list[str]], unwanted: tuple[str, ...]) -> None:
    ran = run_python(_HELP.format(arguments=arguments, unwanted=unwanted))
    assert ran.returncode == 0, ran.stderr


def test_the_import_check_detects_an_import() -> None:
    """Control for the test above."""
    ran = run_python("import sys, rich\n" + _HELP.format(arguments=[["--help"]], unwanted=("rich",)))
    assert "AssertionError: (['--help'], ['rich'])" in ran.stderr


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    text = capsys.readouterr().out
    assert re.findall(r"^  ([\w-]+)", text.split("Commands:\n")[1].split("\n\n")[0], re.MULTILINE) == list(
        COMMANDS
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_names_it(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([command, "--help"])
    assert capsys.readouterr().out.startswith(f"Usage: kvexport {command} ")


def test_module_and_version() -> None:
    ran = subprocess.run([sys.executable, "-m", "kvexport", "--version"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"kvexport {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Usage: kvexport"),
        (["nonsense"], "nonsense"),
        (["run", "--nonsense", "x"], "--nonsense"),
        (["run"], "BUNDLE"),
        (["run", "bundle"], "--prompt"),
        (["run", "bundle", "--prompt", "x", "--max-new-tokens", "many"], "many"),
    ],
)
def test_wrong_usage_exits_with_2_and_the_reason(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KvexportError("odd", got=1), 2, "kvexport: odd\n  got:      1\n"),
        (GateFailed("too far", expected="less"), 1, "kvexport: too far\n  expected: less\n"),
        (UsageError("wrong"), 2, "kvexport: wrong\n"),
        (CheckpointError("no checkpoint"), 2, "kvexport: no checkpoint\n"),
        (BundleError("damaged", fix="copy it again"), 2, "kvexport: damaged\n  fix:      copy it again\n"),
        (CannotRunHere("no memory"), 3, "kvexport: no memory\n"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.exceptions.Abort(), 130, "interrupted"),
        (MemoryError(), 3, "not have enough memory"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            3,
            "the disk is full\n  got:      No space left on device\n  fix:      free space",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "/there"),
            3,
            "/there cannot be read or written\n  got:      Read-only file system\n  fix:      change the "
            "permissions",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 3, "Disk quota exceeded"),
        (OSError(errno.EFBIG, "File too large"), 3, "File too large"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/there"),
            3,
            "/there cannot be read or written\n  got:      Permission denied\n  fix:",
        ),
        (OSError(errno.EIO, "Input/output error"), 3, "Input/output error"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 3, "pip install 'kvexport[convert]'"),
        (
            ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime"),
            3,
            "pip install 'kvexport[cpu]'",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_error_has_its_exit_code_and_no_traceback(
    error: BaseException,
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exit_code([], command=command_that_raises(error)) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err


def test_a_bug_raises_with_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        main([], command=command_that_raises(ZeroDivisionError("a bug")))


def command_that_raises(error: BaseException) -> click.Command:
    @click.command()
    def command() -> None:
        raise error

    return command


_SIGNALLED = """
import os, signal
import click
from kvexport.cli import main
@click.command()
def command():
    for _ in range(1000):
        os.kill(os.getpid(), signal.{name})
    print("not interrupted")
main([], command=command)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_exits_with_130(name: str) -> None:
    ran = run_python(_SIGNALLED.format(name=name))
    assert (ran.returncode, ran.stdout) == (130, "")
    assert ran.stderr.strip() == "kvexport: interrupted"


def test_a_hangup_signal_is_ignored_under_nohup() -> None:
    ran = run_python(
        "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)" + _SIGNALLED.format(name="SIGHUP")
    )
    assert (ran.returncode, ran.stdout) == (0, "not interrupted\n")


_WITHOUT = """
import sys
sys.modules[{missing!r}] = None  # as if it were not installed
from kvexport.cli import main
main({arguments})
"""


@pytest.mark.parametrize(
    ("arguments", "missing", "extra"),
    [
        (["build", "--demo", "-o", "out"], "torch", "convert"),
        (["compress", "x", "-o", "out"], "torch", "convert"),
        (["calibrate", "x", "-o", "out"], "torch", "convert"),
        (["evaluate", "x", "--against", "y", "--text", "z"], "torch", "convert"),
        (["build", "--demo", "-o", "out"], "onnx_ir", "convert"),
    ],
)
def test_a_missing_package_is_reported_with_its_extra(
    arguments: list[str], missing: str, extra: str, tmp_path: Path
) -> None:
    ran = run_python(_WITHOUT.format(missing=missing, arguments=arguments), cwd=tmp_path)
    assert ran.returncode == 3
    assert f"fix:      pip install 'kvexport[{extra}]'" in ran.stderr
    assert missing in ran.stderr and "Traceback" not in ran.stderr
    assert not list(tmp_path.iterdir())
