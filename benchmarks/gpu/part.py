"""Shared by the scripts of the parts: their settings, the kvexport commands that they run, and their record.

A part is a process: `SCRIPT SETTINGS RESULT SECONDS [argument]`. It writes its results after every step, so
that a failure loses nothing that was measured before, and exits with 1 if a step failed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from settings import Settings

ROOT = Path(__file__).resolve().parents[2]


class Part:
    """One part at work.

    Attributes:
        found: its record so far.
        argument: what distinguishes it from other parts of the same script; "" if nothing does.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.settings = Settings.read(Path(arguments[0]))
        self._result = Path(arguments[1])
        self._until = time.monotonic() + float(arguments[2])
        self.argument = arguments[3] if len(arguments) > 3 else ""
        self.found: dict[str, Any] = {}
        self.commands: list[dict[str, Any]] = []
        self.failures: list[str] = []

    @property
    def left(self) -> float:
        """Seconds until this part is ended."""
        return self._until - time.monotonic()

    def save(self) -> None:
        written = {"result": self.found, "commands": self.commands, "failures": self.failures}
        aside = self._result.with_suffix(".new")
        aside.write_text(json.dumps(written) + "\n", encoding="utf-8")
        aside.replace(self._result)

    def failed(self, what: str) -> None:
        print(what, file=sys.stderr, flush=True)
        self.failures.append(what)
        self.save()

    def kvexport(
        self, *arguments: str | Path, required: bool = True, threads: int | None = None
    ) -> list[dict[str, Any]]:
        """The JSON lines that a verb prints with --json; none where it printed none. A failure is the part's
        if `required`."""
        shown = " ".join(("kvexport", *(each.name if isinstance(each, Path) else each for each in arguments)))
        environment = dict(os.environ) if threads is None else {"OMP_NUM_THREADS": str(threads), **os.environ}
        command = [sys.executable, "-m", "kvexport", *map(str, arguments), "--json"]
        begin = time.monotonic()
        ended = subprocess.run(command, capture_output=True, text=True, env=environment)
        print(f"$ {shown}\n{ended.stderr}", file=sys.stderr, flush=True)
        entry: dict[str, Any] = {
            "command": shown,
            "exit_code": ended.returncode,
            "seconds": round(time.monotonic() - begin, 1),
        }
        if ended.returncode:
            entry["stderr_end"] = ended.stderr.splitlines()[-12:]
        self.commands.append(entry)
        if ended.returncode and required:
            self.failed(f"{shown}: exit code {ended.returncode}")
        self.save()
        return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Around all that the part does: saves, and exits with 1 if anything failed."""
        try:
            yield
        finally:
            self.save()
        sys.exit(1 if self.failures else 0)

    def bundle(self, kv_heads: int) -> Path:
        """
        Raises:
            SystemExit: the part "models" did not make it.
        """
        path = self.settings.bundle(kv_heads)
        if not path.is_dir():
            self.failed(f"there is no {path.name}: the part models must run first")
            sys.exit(1)
        return path

    def bench(
        self, *bundles: Path, depths: Sequence[int], steps: int, provider: str | None = None
    ) -> list[dict[str, Any]]:
        """`kvexport bench` of one bundle, or of two that take turns."""
        compared = ("--compare", bundles[1]) if len(bundles) > 1 else ()
        return self.kvexport(
            "bench",
            bundles[0],
            *compared,
            "--provider",
            provider or self.settings.provider,
            "-d",
            ",".join(map(str, depths)),
            "-n",
            str(steps),
            "--repetitions",
            str(self.settings.repetitions),
            "-p",
            str(min(512, max(self.settings.depths))),
        )

    def validate(
        self, bundle: Path, provider: str | None = None, required: bool = True
    ) -> list[dict[str, Any]]:
        return self.kvexport(
            "validate", bundle, "--provider", provider or self.settings.provider, required=required
        )

    def self_test(
        self, bundle: Path, provider: str | None = None, required: bool = True
    ) -> list[dict[str, Any]]:
        return self.kvexport(
            "self-test", bundle, "--provider", provider or self.settings.provider, required=required
        )


def summary(milliseconds: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles, and every sample."""
    raw = [round(each, 4) for each in milliseconds]
    low, median, high = statistics.quantiles(raw, n=4)
    return {"median_ms": round(median, 4), "quartiles_ms": [round(low, 4), round(high, 4)], "samples_ms": raw}


def run(work: Any) -> None:
    """The main of a part's script: `work(part)`."""
    part = Part(sys.argv[1:])
    with part.finishing():
        work(part)
