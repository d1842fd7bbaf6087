"""A build that is interrupted, or finds the disk full, in any stage leaves nothing behind: real processes, real signals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

# Forks a process for each case, once everything is imported. It runs the command line, and at one event (the nth sign
# of progress, or the end of a named function) sends itself a signal; or it may not write files beyond a size.
_HARNESS = """
import json, os, resource, sys
from importlib import import_module
import torch, kvexport.build.pipeline, kvexport.graph.split_layers, kvexport.graph.writer
from kvexport.cli import main
from kvexport.cli.options import BarProgress

def wrap(owner, name, after):
    original = getattr(owner, name)
    def wrapped(*arguments, **options):
        result = original(*arguments, **options)
        after()
        return result
    setattr(owner, name, wrapped)

def child(arguments, case):
    seen = 0
    def interrupt():
        os.kill(os.getpid(), case["signal"])
    def count():
        nonlocal seen
        seen += 1
        if seen == case.get("nth"):
            interrupt()
    for name in ("stage", "advance"):
        wrap(BarProgress, name, count)
    if "after" in case:
        module, path = case["after"].split(":")
        owner, *names = [import_module(module), *path.split(".")]
        for name in names[:-1]:
            owner = getattr(owner, name)
        wrap(owner, names[-1], interrupt)
    if "limit" in case:
        resource.setrlimit(resource.RLIMIT_FSIZE, (case["limit"], case["limit"]))
    try:
        main(arguments)
    except SystemExit as ended:
        return ended.code, seen
    return 0, seen

torch.set_num_threads(1)
arguments, cases = json.loads(sys.argv[1])
for case in cases:
    (said, say), (heard, complain) = os.pipe(), os.pipe()
    if not os.fork():
        os.dup2(complain, 2)
        os.write(say, json.dumps(child(arguments, case)).encode())
        os._exit(0)
    os.close(say), os.close(complain)
    with open(said) as result, open(heard) as errors:
        print(json.dumps([*json.loads(result.read()), errors.read()]), flush=True)
    os.wait()
    sys.stdin.readline()  # until what is left was looked at
"""


class Builds:
    """Runs `kvexport build` again and again, always with the same arguments."""

    def __init__(self, arguments: list[str], parent: Path) -> None:
        self._arguments, self._parent = arguments, parent

    def each(self, cases: list[dict[str, Any]]) -> list[tuple[dict[str, Any], int, int, str, list[str]]]:
        """Of each case: the case, exit code, signs of progress, standard error, names left in the output's folder."""
        process = subprocess.Popen(
            [sys.executable, "-c", _HARNESS, json.dumps([self._arguments, cases])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        found = []
        with process:
            for case in cases:
                code, seen, errors = json.loads(process.stdout.readline())
                found.append(
                    (case, code, seen, errors, sorted(entry.name for entry in self._parent.iterdir()))
                )
                process.stdin.write("\n")
                process.stdin.flush()
        assert process.returncode == 0
        return found


@pytest.fixture
def arguments(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> list[str]:
    """`kvexport build` of a tiny checkpoint whose every stage takes a few steps."""
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
        "--quiet",
    ]


def test_a_signal_in_any_stage_leaves_nothing(arguments: list[str], tmp_path: Path) -> None:
    builds = Builds(arguments, tmp_path / "parent")
    ((_, code, events, errors, left),) = builds.each([{}])
    assert (code, errors, left) == (0, "", ["out"])  # a control: uninterrupted, it is built
    assert events > 12
    (tmp_path / "parent" / "out").rename(tmp_path / "built")
    stages: list[dict[str, Any]] = [{"nth": nth} for nth in range(1, events + 1)]
    stages += [
        {"after": after}
        for after in (
            "kvexport.model.checkpoint:Checkpoint.digest",
            "kvexport.build.conversion_job:load_decoder",
            "kvexport.build.pipeline:DecoderWriter",
            "kvexport.graph:DecoderWriter.add_layer",
            "kvexport.graph:DecoderWriter.finish",
            "kvexport.validate:TwinRecorder.save",
            "kvexport.validate.self_test_recorder:GreedyRecorder.save",
            "kvexport.model.checkpoint:Checkpoint.copy_tokenizer",
            "kvexport.bundle.bundle:BundleWriter.seal",
            "kvexport.files.atomic_directory:_sync",
        )
    ]
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    cases = [{**stage, "signal": int(signals[index % 3])} for index, stage in enumerate(stages)]
    for case, code, _, errors, left in builds.each(cases):
        assert (code, errors.strip(), left) == (130, "kvexport: interrupted", []), case


def test_an_interrupted_replacement_leaves_the_old_bundle(arguments: list[str], tmp_path: Path) -> None:
    builds = Builds([*arguments, "--force"], tmp_path / "parent")
    builds.each([{}])
    before = (tmp_path / "parent" / "out" / "manifest.json").read_bytes()
    cases = [
        {"nth": 8, "signal": int(signal.SIGINT)},
        {"after": "kvexport.files.atomic_directory:_sync", "signal": int(signal.SIGTERM)},
    ]
    for _, code, _, _, left in builds.each(cases):
        assert (code, left) == (130, ["out"])
        assert (tmp_path / "parent" / "out" / "manifest.json").read_bytes() == before


def test_a_full_disk_in_any_stage_leaves_nothing(arguments: list[str], tmp_path: Path) -> None:
    """No file may grow beyond each of these sizes: none at all, up to all but one byte of the largest."""
    builds = Builds(arguments, tmp_path / "parent")
    builds.each([{}])
    built = (tmp_path / "parent" / "out").rename(tmp_path / "built")
    sizes = sorted(file.stat().st_size for file in built.iterdir())
    limits = [0, 100, *(size - 1 for size in sizes[-4:])]
    for case, code, _, errors, left in builds.each([{"limit": limit} for limit in limits]):
        assert (code, left) == (3, []), (case, errors)
        assert "the disk is full" in errors and "fix:" in errors and "Traceback" not in errors
    ((_, code, _, errors, left),) = builds.each(
        [{"limit": sizes[-1]}]
    )  # a control: with the last byte, it is built
    assert (code, errors, left) == (0, "", ["out"])


@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_a_signal_from_outside_while_it_writes(arguments: list[str], delay: float, tmp_path: Path) -> None:
    """The command itself, which does not know what will happen; as soon as something of its output is there, and later."""
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


def test_an_interruption_that_native_code_made_an_error_of_is_still_one() -> None:
    """As safetensors does where the signal arrives while it imports torch."""
    code = (
        "import os, signal, kvexport.cli as cli, kvexport.devices.targets as targets\n"
        "def known_targets():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    except KeyboardInterrupt:\n"
        "        raise AttributeError('UntypedStorage') from None\n"
        "targets.known_targets = known_targets\n"
        "cli.main(['targets'])\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr.strip()) == (130, "kvexport: interrupted")
