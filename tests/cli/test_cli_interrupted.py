"""Tests of builds that are interrupted or find the disk full: real processes and real signals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytestmark = pytest.mark.slow

# Imports everything once, then forks a process for each case. The process runs the command line, and sends
# itself a signal at the nth event of progress (a stage begins or ends, or a step is done) or when the files
# are flushed to disk; or its files may not grow beyond a size.
_HARNESS = """
import json, os, resource, sys
from contextlib import contextmanager
import torch, kvexport.build.pipeline, kvexport.graph.split_layers
from kvexport.cli import main
from kvexport.progress import Progress

class SignalAtEvent(Progress):
    def __init__(self, case):
        self.events, self.case = 0, case
    def count(self):
        self.events += 1
        if self.events == self.case.get("event"):
            self.interrupt()
    def interrupt(self):
        os.kill(os.getpid(), self.case["signal"])
    @contextmanager
    def stage(self, name, steps):
        self.count()
        yield
        self.count()
    def advance(self):
        self.count()

def child(arguments, case):
    progress = SignalAtEvent(case)
    if case.get("at_flush"):
        flush = os.fsync
        def interrupted(descriptor):
            flush(descriptor)
            progress.interrupt()
        os.fsync = interrupted
    if "limit" in case:
        resource.setrlimit(resource.RLIMIT_FSIZE, (case["limit"], case["limit"]))
    try:
        main(arguments, progress=progress)
    except SystemExit as ended:
        return ended.code, progress.events
    return 0, progress.events

torch.set_num_threads(1)
arguments, cases = json.loads(sys.argv[1])
for case in cases:
    (result_read, result_write), (errors_read, errors_write) = os.pipe(), os.pipe()
    if not os.fork():
        os.dup2(errors_write, 2)
        os.write(result_write, json.dumps(child(arguments, case)).encode())
        os._exit(0)
    os.close(result_write), os.close(errors_write)
    with open(result_read) as result, open(errors_read) as errors:
        print(json.dumps([*json.loads(result.read()), errors.read()]), flush=True)
    os.wait()
    sys.stdin.readline()  # until the test has listed the files
"""


class Ended(NamedTuple):
    """A build that ended: case, exit code, number of events, standard error, files in the output's folder."""

    case: dict[str, Any]
    code: int
    events: int
    errors: str
    files: list[str]


class Builds:
    """Runs `kvexport build` with the same arguments in several cases."""

    def __init__(self, arguments: list[str], parent: Path) -> None:
        self._arguments, self._parent = arguments, parent

    def run(self, cases: list[dict[str, Any]]) -> list[Ended]:
        process = subprocess.Popen(
            [sys.executable, "-c", _HARNESS, json.dumps([self._arguments, cases])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        ended = []
        with process:
            for case in cases:
                code, events, errors = json.loads(process.stdout.readline())
                files = sorted(entry.name for entry in self._parent.iterdir())
                ended.append(Ended(case, code, events, errors, files))
                process.stdin.write("\n")
                process.stdin.flush()
        assert process.returncode == 0
        return ended


@pytest.fixture
def arguments(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> list[str]:
    """Arguments of `kvexport build` with a tiny checkpoint and few calibration windows."""
    checkpoint = tiny_checkpoint("llama", num_key_value_heads=4)
    (tmp_path / "parent").mkdir()
    return [
        "build",
        str(checkpoint),
        "-o",
        str(tmp_path / "parent" / "out"),
        "--samples",
        "4",
        "--length",
        "8",
        "--no-cache",  # every case does all the work
        "--quiet",
    ]


def test_a_signal_in_any_stage_leaves_nothing(arguments: list[str], tmp_path: Path) -> None:
    builds = Builds(arguments, tmp_path / "parent")
    (control,) = builds.run([{}])
    assert (control.code, control.errors, control.files) == (0, "", ["out"])  # not interrupted
    assert control.events > 30
    (tmp_path / "parent" / "out").rename(tmp_path / "built")
    points: list[dict[str, Any]] = [{"event": event} for event in range(1, control.events + 1)]
    points.append({"at_flush": True})
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    cases = [{**point, "signal": int(signals[index % 3])} for index, point in enumerate(points)]
    for case, code, _, errors, files in builds.run(cases):
        assert (code, errors.strip(), files) == (130, "kvexport: interrupted", []), case


def test_an_interrupted_replacement_leaves_the_old_bundle(arguments: list[str], tmp_path: Path) -> None:
    builds = Builds([*arguments, "--force"], tmp_path / "parent")
    builds.run([{}])
    before = (tmp_path / "parent" / "out" / "manifest.json").read_bytes()
    cases = [
        {"event": 16, "signal": int(signal.SIGINT)},
        {"at_flush": True, "signal": int(signal.SIGTERM)},
    ]
    for ended in builds.run(cases):
        assert (ended.code, ended.files) == (130, ["out"])
        assert (tmp_path / "parent" / "out" / "manifest.json").read_bytes() == before


def test_a_full_disk_in_any_stage_leaves_nothing(arguments: list[str], tmp_path: Path) -> None:
    """Each case limits the size of files: from none at all to all but one byte of the largest."""
    builds = Builds(arguments, tmp_path / "parent")
    builds.run([{}])
    built = (tmp_path / "parent" / "out").rename(tmp_path / "built")
    sizes = sorted(file.stat().st_size for file in built.iterdir())
    limits = [0, 100, *(size - 1 for size in sizes[-4:])]
    for case, code, _, errors, files in builds.run([{"limit": limit} for limit in limits]):
        assert (code, files) == (3, []), (case, errors)
        assert "the disk is full" in errors and "fix:" in errors and "Traceback" not in errors
    (control,) = builds.run([{"limit": sizes[-1]}])  # with the last byte it succeeds
    assert (control.code, control.errors, control.files) == (0, "", ["out"])


@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_a_signal_from_another_process_leaves_nothing(
    arguments: list[str], delay: float, tmp_path: Path
) -> None:
    """The signal is sent as soon as the output has any file, and later."""
    long = [*arguments, "--samples", "64", "--length", "64"]
    process = subprocess.Popen([sys.executable, "-m", "kvexport", *long], stderr=subprocess.PIPE, text=True)
    parent = tmp_path / "parent"
    while not any(parent.iterdir()):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip()) == (130, "kvexport: interrupted")
    assert not list(parent.iterdir())


def test_an_interruption_that_native_code_turns_into_an_error_exits_with_130() -> None:
    """As safetensors does if the signal arrives while it imports torch."""
    code = (
        "import os, signal, click\n"
        "from kvexport.cli import main\n"
        "@click.command()\n"
        "def command():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    except KeyboardInterrupt:\n"
        "        raise AttributeError('UntypedStorage') from None\n"
        "main([], command=command)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr.strip()) == (130, "kvexport: interrupted")
