"""Runs commands on the C++ library in another process: cpp/tests/kvexport_drive.cpp."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from builds import environment
from numpy.typing import NDArray


class Refused(Exception):
    """An error of the library. `parts`: code, failed, got, expected, fix, message."""

    def __init__(self, parts: dict[str, Any]) -> None:
        super().__init__(parts["message"])
        self.parts = parts


class Drive:
    """A process that runs the library. As a context manager it checks that the exit code is 0."""

    def __init__(self, *command: Path, **variables: str) -> None:
        """`command`: directory of a build, or program and arguments; `variables`: of its environment."""
        if command[0].is_dir():
            command = (command[0] / "tests" / "kvexport_drive",)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(**variables),
        )

    def __enter__(self) -> Drive:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        code = self._process.wait(timeout=60)
        assert code == 0, f"exit code {code}; see the sanitizer's output above"

    def __call__(self, do: str, **arguments: Any) -> Any:
        """Run one command.

        Raises:
            Refused: the library returned an error.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the process has ended"
        answer = json.loads(line)
        if "error" in answer:
            raise Refused(answer["error"])
        assert "wrong" not in answer, answer["wrong"]
        return answer["ok"]

    def open(self, bundle: Path, session: str = "s", **options: Any) -> Any:
        """Open a session on the CPU with one thread."""
        return self("open", bundle=str(bundle), session=session, **{"provider": "cpu", **options})

    def new(self, session: str = "s", cache: str = "c", **options: Any) -> Any:
        return self("new", session=session, cache=cache, **options)

    def prefill(self, ids: list[int], cache: str = "c") -> NDArray[np.float32]:
        return logits(self("prefill", cache=cache, ids=ids))

    def step(self, token: int, cache: str = "c") -> NDArray[np.float32]:
        return logits(self("step", cache=cache, id=token))

    def generate(self, ids: list[int], cache: str = "c", **options: Any) -> Any:
        return self("generate", cache=cache, ids=ids, **options)


def logits(text: str) -> NDArray[np.float32]:
    """Parse logits as the process prints them."""
    return np.frombuffer(bytes.fromhex(text), "<f4")


def data_of(path: Path) -> bytes:
    """The data section of a safetensors file."""
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]
