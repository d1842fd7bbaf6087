"""A build that is interrupted, or fills the disk, leaves nothing behind; with real processes and signals."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.combinations import representatives

pytestmark = [pytest.mark.tensorrt, pytest.mark.slow]


def command(bundle: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "kvexport", "engine", str(bundle), "--compute-capability", "8.6", *options]


@pytest.mark.parametrize(
    ("delay", "number"), representatives((0.0, 0.5, 1.0), (signal.SIGINT, signal.SIGTERM), cover=(1,))
)
def test_a_signal_stops_the_build_and_leaves_nothing(
    delay: float, number: signal.Signals, rtx: Any, tiny: Callable[..., Path]
) -> None:
    bundle = tiny(layers=12)
    before = sorted(bundle.iterdir())
    process = subprocess.Popen(command(bundle), stderr=subprocess.PIPE, text=True)
    while not list(bundle.glob("engines/.*.partial")):
        assert process.poll() is None
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip()) == (130, "kvexport: interrupted")
    assert sorted(bundle.iterdir()) == before


def test_a_full_disk_leaves_nothing(rtx: Any, tiny: Callable[..., Path]) -> None:
    bundle = tiny()
    before = sorted(bundle.iterdir())
    for limit in (0, 1000, 100_000):

        def full(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        ran = subprocess.run(command(bundle), capture_output=True, text=True, preexec_fn=full)
        assert ran.returncode == 3 and "the disk is full" in ran.stderr and "Traceback" not in ran.stderr, (
            ran.stderr
        )
        assert sorted(bundle.iterdir()) == before
