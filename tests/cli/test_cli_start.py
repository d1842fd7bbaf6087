"""How the command line starts and ends: what it imports, which verbs there are, and the exit code of every failure."""

from __future__ import annotations

import errno
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

import kvexport.cli
from kvexport import __version__
from kvexport.cli import main
from kvexport.errors import BundleError, CannotRunHere, CheckpointError, GateFailed, KvexportError, UsageError

VERBS = (
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
    """`main` takes over signals, as the process's own; here they are given back."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def run_python(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)  # type: ignore[call-overload]


def ends(arguments: list[str]) -> object:
    """The exit code of a command line."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        ([["--help"], ["-h"], ["--version"]], (*_HEAVY, "numpy", "rich")),
        ([[verb, "--help"] for verb in VERBS], _HEAVY),
    ],
    ids=["kvexport", "verbs"],
)
def test_help_imports_nothing_heavy(arguments: list[list[str]], unwanted: tuple[str, ...]) -> None:
    ran = run_python(_HELP.format(arguments=arguments, unwanted=unwanted))
    assert ran.returncode == 0, ran.stderr


def test_import_control() -> None:
    """The same check does notice a verb that imports what it should not."""
    ran = run_python("import sys, rich\n" + _HELP.format(arguments=[["--help"]], unwanted=("rich",)))
    assert "AssertionError: (['--help'], ['rich'])" in ran.stderr


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    shown = capsys.readouterr().out
    assert re.findall(r"^  ([\w-]+)", shown.split("Verbs:\n")[1], re.MULTILINE) == list(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_names_it(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([verb, "--help"])
    assert capsys.readouterr().out.startswith(f"Usage: kvexport {verb} ")


def test_module_and_version() -> None:
    ran = subprocess.run([sys.executable, "-m", "kvexport", "--version"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"kvexport {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Usage: kvexport"),
        (["nonsense"], "nonsense"),
        (["run", "--nonsense", "x"], "--nonsense"),
        (["run"], "BUNDLE"),
        (["run", "bundle"], "--prompt"),
        (["run", "bundle", "--prompt", "x", "--max-new-tokens", "many"], "many"),
    ],
)
def test_wrong_usage_is_2_and_says_why(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ends(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KvexportError("odd", got=1), 2, "kvexport: odd\n  got:      1\n"),
        (GateFailed("too far", expected="less"), 1, "kvexport: too far\n  expected: less\n"),
        (UsageError("wrong"), 2, "kvexport: wrong\n"),
        (CheckpointError("no checkpoint"), 2, "kvexport: no checkpoint\n"),
        (BundleError("damaged", fix="copy it again"), 2, "kvexport: damaged\n  fix:      copy it again\n"),
        (CannotRunHere("no memory"), 3, "kvexport: no memory\n"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.exceptions.Abort(), 130, "interrupted"),
        (MemoryError(), 3, "out of memory"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            3,
            "the disk is full (No space left on device)\n  fix:      free space",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "/there"),
            3,
            "system: /there\n  fix:      make it writable",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 3, "Disk quota exceeded"),
        (OSError(errno.EFBIG, "File too large"), 3, "File too large"),
        (PermissionError(errno.EACCES, "Permission denied", "/there"), 3, "Permission denied: /there"),
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
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fail_with(error, monkeypatch)
    assert ends(["run"]) == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(ZeroDivisionError("a bug"), monkeypatch)
    with pytest.raises(ZeroDivisionError):
        main(["run"])


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every verb raise `error`."""

    @click.command()
    def failing() -> None:
        raise error

    monkeypatch.setattr(kvexport.cli, "import_module", lambda name: SimpleNamespace(command=failing))


_SIGNALLED = """
import os, signal, sys
from types import SimpleNamespace
import click, kvexport.cli
@click.command()
def waiting():
    for _ in range(1000):
        os.kill(os.getpid(), signal.{name})
    print("went on")
kvexport.cli.import_module = lambda name: SimpleNamespace(command=waiting)
kvexport.cli.main(["run"])
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_with_130(name: str) -> None:
    ran = run_python(_SIGNALLED.format(name=name))
    assert (ran.returncode, ran.stdout) == (130, "")
    assert ran.stderr.strip() == "kvexport: interrupted"


def test_nohup_is_respected() -> None:
    ran = run_python(
        "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)" + _SIGNALLED.format(name="SIGHUP")
    )
    assert (ran.returncode, ran.stdout) == (0, "went on\n")


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
def test_a_missing_package_names_the_extra(
    arguments: list[str], missing: str, extra: str, tmp_path: Path
) -> None:
    ran = run_python(_WITHOUT.format(missing=missing, arguments=arguments), cwd=tmp_path)
    assert ran.returncode == 3
    assert f"fix:      pip install 'kvexport[{extra}]'" in ran.stderr
    assert missing in ran.stderr and "Traceback" not in ran.stderr
    assert not list(tmp_path.iterdir())
